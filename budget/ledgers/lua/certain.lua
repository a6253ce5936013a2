-- What happened outside of these books is entered in them, whatever is free. Goes before take.lua and enter.lua.

-- Takes from the slice that a limit names what is booked instead, in the window of the slice.
local function draw(limit, amount)
  local key = tag .. ':h:' .. limit[SLICE]
  local packed, swept = unpack(call('HMGET', key, 'b', 'x'))
  if not packed then
    return
  end
  local record = cmsgpack.unpack(packed)
  local whole = record[LIMITS][1]
  limit[START] = whole[START]
  if not swept then
    local held = count(whole, record[AMOUNTS])
    local left = max(0, held - amount)
    replace(whole, held, 0, left, 0)
    record[AMOUNTS][min(limit[UNIT], REQUESTS)] = left
    call('HSET', key, 'b', cmsgpack.pack(record))
  end
end

-- Books what was held or settled at `at_s` in the windows of that moment. What that puts beyond a limit is debt.
local function book_for_certain(limit, at_s, held, settled)
  local grown = held + settled
  if RATE_S[limit[WINDOW]] then
    return replace(limit, 0, 0, held, settled)
  end
  limit[START] = window_start(limit[WINDOW], at_s)
  if limit[SLICE] ~= '' then
    draw(limit, grown)
  end
  replace(limit, 0, 0, held, settled)
  if limit[UNIT] == CONCURRENCY then
    return
  end
  local all_settled, all_held = page(limit)
  local debt = tonumber(call('HGET', key_of(limit), limit[START] .. 'd') or 0)
  owe(limit, max(0, min(grown, all_settled + all_held - limit[AMOUNT] - debt)))
  keep_window(limit)
end
