-- Ends holds, each once: replaces what they hold by what they used, and corrects what a sweep settled.
-- Given: owner, then for each: id, whether it was taken (else it is released for good), what it used as amounts.
-- Returns: the ids that were taken and are unknown here: enter.lua books them.

local given, unknown = cmsgpack.unpack(ARGV[1]), {}
local owner = given[1]
for i = 2, #given, 3 do
  local id, was_taken, used = given[i], given[i + 1], given[i + 2]
  local packed, swept = unpack(call('HMGET', tag .. ':h:' .. id, 'b', 'x'))
  if packed then
    local record = cmsgpack.unpack(packed)
    if swept then
      correct(record, cmsgpack.unpack(swept), used)
    else
      close(record, used)
    end
    end_hold(id, owner, record[LABEL])
  elseif not was_taken then
    end_hold(id, owner, nil) -- should it still arrive, it is not taken
  elseif not call('ZSCORE', tag .. ':ended:' .. owner, id) then
    unknown[#unknown + 1] = id
  end
end
call('EXPIRE', tag .. ':ended:' .. owner, SILENT_S)
return unknown
