-- The books in Redis: what every script shares. The rules are those of budget/books.py.
--
-- KEYS[1] is the ledger's tag, e.g. `{thinkgate}`. Every key begins with it, so all are in one slot of a cluster.
-- ARGV[1] is an array in MessagePack, with false for what is not there. Amounts in it are four numbers: tokens,
-- thinking tokens, nano-USD, requests; a limit is account, unit, window, amount, start, slice.
-- ARGV[2] is the time in epoch seconds; empty, as always but in tests, for the server's own.
--
-- TAG:a:SCOPE|UNIT|WINDOW  an account. Of a calendar window, a hash: `n`, when the newest window began, and for every
--                          window that is kept START..h held, START..s settled, START..d debt. A new window is new fields;
--                          nothing is ever reset. Of a rate, a string: its level, when that was seen, and its amount.
-- TAG:h:ID                 a hold, a hash: `b` its record, `u` what it had used when it last reported; once a sweep
--                          has settled it `x`, at what, until its owner says how it really ended.
-- TAG:leases, TAG:slices   hold ids by when their lease ends; those of slices are apart.
-- TAG:ended:OWNER          ids of holds that have ended, by when: they are neither taken nor settled again.
-- TAG:u:DAY, TAG:days      usage: LABEL|r requests, |t tokens, |k thinking tokens, |n nano-USD; days since 1970, by
--                          themselves.
--
-- Lua knows doubles only: counts are exact below 2^53.

local floor, max, min = math.floor, math.max, math.min
local call = redis.call
local tag = KEYS[1]

local REQUESTS, CONCURRENCY = 4, 5 -- units; 1 to 3 are tokens, thinking tokens and nano-USD
local ACCOUNT, UNIT, WINDOW, AMOUNT, START, SLICE = 1, 2, 3, 4, 5, 6 -- of a limit
local LABEL, DAY, AMOUNTS, LIMITS = 1, 2, 3, 4 -- of a hold's record
local LENGTH_S = {hour = 3600, day = 86400}
local RATE_S = {second = 1, minute = 60}
local JUMP_BACK_S, ROUNDING, KEPT_WINDOWS = 86400, 1e-6, 3
local ENDED_S, SILENT_S, KEPT_DAYS = 120, 86400, 400

local now_s = tonumber(ARGV[2])
if not now_s then
  local time = call('TIME')
  now_s = time[1] + time[2] / 1000000
end

-- Redis itself would write 5e10 as "5e+10", which is no integer to HINCRBY, and cut off what is behind the point.
local function int(number)
  return string.format('%.0f', number)
end

local function exact(number)
  return string.format('%.17g', number)
end

local function key_of(limit)
  return tag .. ':a:' .. limit[ACCOUNT]
end

-- What a limit counts of the amounts of a hold.
local function count(limit, amounts)
  return amounts[min(limit[UNIT], REQUESTS)]
end

-- When the calendar window that holds a moment began.
local function window_start(window, at_s)
  local length_s = LENGTH_S[window]
  if length_s then
    return floor(at_s / length_s) * length_s
  end
  if window ~= 'month' then
    return 0
  end
  -- Years begin on 1 March here, of the year 0, so that leap days come last; a month's first day follows.
  local day = floor(at_s / 86400)
  local of_era = (day + 719468) % 146097
  local year = floor((of_era - floor(of_era / 1460) + floor(of_era / 36524) - floor(of_era / 146096)) / 365)
  local of_year = of_era - (365 * year + floor(year / 4) - floor(year / 100))
  local month = floor((5 * of_year + 2) / 153)
  return (day - of_year + floor((153 * month + 2) / 5)) * 86400
end

-- When a window ends that was opened; nil if it never does.
local function window_end(limit)
  local start, length_s = limit[START], LENGTH_S[limit[WINDOW]]
  if length_s then
    return start + length_s
  end
  return limit[WINDOW] == 'month' and window_start('month', start + 32 * 86400) or nil
end

-- ------------------------------------------------------------------------------------------------------- rates

-- An empty bucket says no more than none at all, so it may expire; a day late, as clocks jump back.
local function set_level(limit, level, amount)
  local live_s = level * RATE_S[limit[WINDOW]] / amount + JUMP_BACK_S
  call('SET', key_of(limit), cmsgpack.pack({level, now_s, amount}), 'EX', int(live_s))
end

-- The present level of a rate, and the amount by which it runs out: the limit's at the last hold. Whoever looks after the
-- clock was set back takes the bucket along.
local function level_of(limit)
  local packed = call('GET', key_of(limit))
  if not packed then
    return 0, limit[AMOUNT]
  end
  local level, seen_s, amount = unpack(cmsgpack.unpack(packed))
  if seen_s > now_s then
    set_level(limit, level, amount)
    return level, amount
  end
  return max(0, level - (now_s - seen_s) / (RATE_S[limit[WINDOW]] / amount)), amount
end

-- ------------------------------------------------------------------------------------------- calendar windows

-- What a window has settled and holds.
local function page(limit)
  local found = call('HMGET', key_of(limit), limit[START] .. 's', limit[START] .. 'h')
  return tonumber(found[1] or 0), tonumber(found[2] or 0)
end

-- When the windows that are kept began, in order.
local function kept_starts(limit)
  local seen, starts = {}, {}
  for _, field in ipairs(call('HKEYS', key_of(limit))) do
    local start = tonumber(string.match(field, '^(%d+)%a$'))
    if start and not seen[start] then
      seen[start] = true
      starts[#starts + 1] = start
    end
  end
  table.sort(starts)
  return starts
end

-- Once something is booked in a window: what it needs if it is a new one. Old ones that hold nothing are forgotten.
local function keep_window(limit)
  local key, start = key_of(limit), limit[START]
  if start == 0 then
    return
  end
  local starts = kept_starts(limit)
  if #starts == 0 then
    return
  end
  for i = 1, #starts - KEPT_WINDOWS do
    if starts[i] ~= start and tonumber(call('HGET', key, starts[i] .. 'h') or 0) == 0 then
      call('HDEL', key, starts[i] .. 's', starts[i] .. 'h', starts[i] .. 'd')
    end
  end
  call('HSET', key, 'n', starts[#starts])
  call('EXPIRE', key, KEPT_DAYS * 86400)
end

-- Enters the present window into a limit; what it has settled and holds, and whether it is known yet. A clock that was
-- set back stays in the newest window, so that nothing spent is free again; one that was years ahead hides nothing.
local function present_page(limit)
  local key, start = key_of(limit), window_start(limit[WINDOW], now_s)
  local found = call('HMGET', key, 'n', start .. 's', start .. 'h')
  local newest = tonumber(found[1] or 0)
  limit[START] = start
  if newest > start then
    for _, other in ipairs(kept_starts(limit)) do
      if other > start and other <= now_s + JUMP_BACK_S then
        limit[START] = other
      end
    end
    found = call('HMGET', key, 'n', limit[START] .. 's', limit[START] .. 'h')
  end
  return tonumber(found[2] or 0), tonumber(found[3] or 0), found[3] and true
end

-- ------------------------------------------------------------------------------------------------------- holds

-- In one limit, what a hold held becomes `new_held` and what it settled `new_settled`.
local function replace(limit, held, settled, new_held, new_settled)
  if RATE_S[limit[WINDOW]] then
    local level, amount = level_of(limit)
    local moved = new_held + new_settled - held - settled
    if moved ~= 0 then
      set_level(limit, max(0, level + moved), amount)
    end
    return
  end
  if new_held ~= held then
    call('HINCRBY', key_of(limit), limit[START] .. 'h', int(new_held - held))
  end
  if new_settled ~= settled and limit[UNIT] ~= CONCURRENCY then
    call('HINCRBY', key_of(limit), limit[START] .. 's', int(new_settled - settled))
  end
end

-- Books as debt what was used though it was not held.
local function owe(limit, amount)
  if amount ~= 0 and limit[UNIT] ~= CONCURRENCY and not RATE_S[limit[WINDOW]] then
    call('HINCRBY', key_of(limit), limit[START] .. 'd', int(amount))
  end
end

-- Adds to the usage of a hold's day.
local function enter_usage(record, used, sign)
  local key, label = tag .. ':u:' .. record[DAY], record[LABEL]
  for i, what in ipairs({'|t', '|k', '|n', '|r'}) do
    if used[i] ~= 0 then
      local sum = call('HINCRBY', key, label .. what, int(sign * used[i]))
      if i == REQUESTS and sum == used[i] then
        call('ZADD', tag .. ':days', record[DAY], record[DAY])
      end
    end
  end
end

-- Settles a hold.
local function close(record, used)
  for _, limit in ipairs(record[LIMITS]) do
    local held, spent = count(limit, record[AMOUNTS]), count(limit, used)
    replace(limit, held, 0, 0, spent)
    owe(limit, max(0, spent - held))
  end
  enter_usage(record, used, 1)
end

-- Corrects a hold that a sweep settled at `swept`.
local function correct(record, swept, used)
  for _, limit in ipairs(record[LIMITS]) do
    local held, old, new = count(limit, record[AMOUNTS]), count(limit, swept), count(limit, used)
    replace(limit, 0, old, 0, new)
    owe(limit, max(new - old, min(0, held - old)))
  end
  enter_usage(record, swept, -1)
  enter_usage(record, used, 1)
end

-- Where the leases of holds with a label are. Only slices have none; they may be leased for longer.
local function leases_of(label)
  return label == '' and tag .. ':slices' or tag .. ':leases'
end

-- Writes down a hold that was taken.
local function open_hold(id, label, at_s, amounts, limits, lease_s)
  for _, limit in ipairs(limits) do
    limit[SLICE] = nil
  end
  call('HSET', tag .. ':h:' .. id, 'b', cmsgpack.pack({label, floor(at_s / 86400), amounts, limits}))
  call('ZADD', leases_of(label), exact(now_s + lease_s), id)
end

-- Writes down that a hold has ended, so that nothing under its id happens again.
local function end_hold(id, owner, label)
  call('DEL', tag .. ':h:' .. id)
  call('ZREM', leases_of(label), id)
  call('ZADD', tag .. ':ended:' .. owner, exact(now_s), id)
end

-- Adds to a reply how a limit stands: of a calendar window settled, held and how long it lasts in us (-1: for ever); of
-- a rate its level.
local function add_standing(reply, limit, a, b)
  local left_us = 0
  if RATE_S[limit[WINDOW]] then
    a, b = exact(a), 0
  else
    local end_s = window_end(limit)
    left_us = end_s and floor(max(0, end_s - now_s) * 1000000 + 0.5) or -1
  end
  local n = #reply
  reply[n + 1], reply[n + 2], reply[n + 3] = a, b, left_us
end

-- How every limit stands.
local function standings(answer, limits)
  local reply = {answer}
  for _, limit in ipairs(limits) do
    if RATE_S[limit[WINDOW]] then
      add_standing(reply, limit, level_of(limit))
    else
      add_standing(reply, limit, page(limit))
    end
  end
  return reply
end
