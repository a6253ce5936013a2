-- Raises a hold to new amounts in its own windows, or leaves it as it is. It never shrinks.
-- Given: id, owner, amounts, limits as they are now.
-- Returns: 1 extended, 0 refused, -1 swept or ended, -2 unknown; how each limit stands.

local id, owner, amounts, limits = unpack(cmsgpack.unpack(ARGV[1]))
local key = tag .. ':h:' .. id
local packed, swept = unpack(call('HMGET', key, 'b', 'x'))
if swept or not packed then
  return {(swept or call('ZSCORE', tag .. ':ended:' .. owner, id)) and -1 or -2}
end
local record = cmsgpack.unpack(packed)
local old, grows, fits = record[AMOUNTS], false, true
for i = 1, #amounts do
  amounts[i] = max(amounts[i], old[i])
  grows = grows or amounts[i] > old[i]
end
for i, limit in ipairs(limits) do
  limit[START] = record[LIMITS][i][START]
  local more = count(limit, amounts) - count(limit, old)
  if RATE_S[limit[WINDOW]] then
    fits = fits and more <= max(0, floor(limit[AMOUNT] - level_of(limit) + ROUNDING))
  else
    local settled, held = page(limit)
    fits = fits and more <= max(0, limit[AMOUNT] - settled - held)
  end
end
if grows and not fits then
  return standings(0, limits)
end
for _, limit in ipairs(limits) do
  replace(limit, count(limit, old), 0, count(limit, amounts), 0)
end
record[AMOUNTS] = amounts
call('HSET', key, 'b', cmsgpack.pack(record))
return standings(1, limits)
