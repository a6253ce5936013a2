-- Ends holds, each once: replaces what they hold by what they used, and corrects what a sweep settled.
-- ARGV: now, owner, then for each: id, whether it was taken ('1', or '0' to release it for good), four amounts.
-- Returns: the ids that were taken and are unknown here: enter.lua books them.

local owner, unknown = ARGV[2], {}
for i = 3, #ARGV - 5, 6 do
  local id, used = ARGV[i], read_amounts(i + 2)
  local packed, swept = unpack(call('HMGET', tag .. ':h:' .. id, 'b', 'x'))
  if packed then
    local record = cmsgpack.unpack(packed)
    if swept then
      correct(record, last_report(swept), used)
    else
      close(record, used)
    end
    end_hold(id, owner, record[LABEL])
  elseif ARGV[i + 1] == '0' then
    end_hold(id, owner, nil) -- should it still arrive, it is not taken
  elseif not call('ZSCORE', tag .. ':ended:' .. owner, id) then
    unknown[#unknown + 1] = id
  end
end
call('EXPIRE', tag .. ':ended:' .. owner, SILENT_S)
return unknown
