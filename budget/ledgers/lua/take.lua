-- Takes a hold in every limit, or in none.
-- Given: id, owner, lease in s, when it was taken if it is certain, label, amounts, limits.
-- Returns: 1 taken, 0 refused, -1 ended before; how each limit stands.

local id, owner, lease_s, taken_s, label, amounts, limits = unpack(cmsgpack.unpack(ARGV[1]))
local known = call('HMGET', tag .. ':h:' .. id, 'b', 'x')
if known[1] and not known[2] then
  return standings(1, cmsgpack.unpack(known[1])[LIMITS])
end
if known[2] or call('ZSCORE', tag .. ':ended:' .. owner, id) then
  return {-1}
end

-- What each limit has settled and holds, or its level; and whether there is room in all of them.
local function look()
  local fits, found = true, {}
  for i, limit in ipairs(limits) do
    local need = count(limit, amounts)
    if RATE_S[limit[WINDOW]] then
      found[i] = {level_of(limit)}
      fits = fits and need <= max(0, floor(limit[AMOUNT] - found[i][1] + ROUNDING))
    else
      found[i] = {present_page(limit)}
      fits = fits and need <= max(0, limit[AMOUNT] - found[i][1] - found[i][2])
    end
  end
  return fits, found
end

local function hold(limit, need, found)
  if RATE_S[limit[WINDOW]] then
    found[1] = found[1] + need
    return set_level(limit, found[1], limit[AMOUNT])
  end
  found[2] = found[2] + need
  call('HINCRBY', key_of(limit), limit[START] .. 'h', int(need))
  if not found[3] then
    keep_window(limit)
  end
end

if taken_s then
  for _, limit in ipairs(limits) do
    book_for_certain(limit, taken_s, count(limit, amounts), 0)
  end
  open_hold(id, label, taken_s, amounts, limits, lease_s)
  return standings(1, limits)
end

local fits, found = look()
local reply = {fits and 1 or 0}
for i, limit in ipairs(limits) do
  if fits then
    hold(limit, count(limit, amounts), found[i])
  end
  add_standing(reply, limit, found[i][1], found[i][2])
end
if fits then
  open_hold(id, label, now_s, amounts, limits, lease_s)
end
return reply
