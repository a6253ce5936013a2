-- Settles a hold that is unknown here: these books lost it, or it was granted while they could not be reached.
-- Given: id, owner, when it was taken, and when it ended if it was known here once, label, amounts held, amounts used, limits.

local id, owner, taken_s, ended_s, label, amounts, used, limits = unpack(cmsgpack.unpack(ARGV[1]))
if call('EXISTS', tag .. ':h:' .. id) == 1 or call('ZSCORE', tag .. ':ended:' .. owner, id) then
  return
end
if ended_s and now_s - ended_s > SILENT_S then
  return -- it may have been settled before its owner fell silent, and that is forgotten by now
end
for _, limit in ipairs(limits) do
  local held, spent = count(limit, amounts), count(limit, used)
  book_for_certain(limit, taken_s, 0, min(held, spent))
  replace(limit, 0, 0, 0, max(0, spent - held))
  owe(limit, max(0, spent - held))
end
enter_usage({label, floor(taken_s / 86400)}, used, 1)
end_hold(id, owner, label)
call('EXPIRE', tag .. ':ended:' .. owner, SILENT_S)
