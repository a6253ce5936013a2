-- Settles a hold that is unknown here: these books lost it, or it was granted while they could not be reached.
-- ARGV: now, id, owner, when it was taken, label, four amounts held, four used, limits.

local id, owner, taken_s = ARGV[2], ARGV[3], tonumber(ARGV[4])
local amounts, used = read_amounts(6), read_amounts(10)
if call('EXISTS', tag .. ':h:' .. id) == 1 or call('ZSCORE', tag .. ':ended:' .. owner, id) then
  return
end
for _, limit in ipairs(read_limits(14)) do
  local held, spent = count(limit, amounts), count(limit, used)
  book_for_certain(limit, taken_s, 0, min(held, spent))
  replace(limit, 0, 0, 0, max(0, spent - held))
  owe(limit, max(0, spent - held))
end
enter_usage({ARGV[5], floor(taken_s / 86400)}, used, 1)
end_hold(id, owner, ARGV[5])
call('EXPIRE', tag .. ':ended:' .. owner, SILENT_S)
