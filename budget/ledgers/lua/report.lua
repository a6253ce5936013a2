-- Renews the leases of holds and notes what they have used so far.
-- Given: lease in s, then for each: id, what it used as amounts.
-- Returns: the ids that are unknown. A hold that was swept stays so: its settlement will correct it. A slice is lost then.

local given, unknown = cmsgpack.unpack(ARGV[1]), {}
local lease_end = exact(now_s + given[1])
for i = 2, #given, 2 do
  local id = given[i]
  local key = tag .. ':h:' .. id
  if call('ZSCORE', tag .. ':leases', id) then
    call('ZADD', tag .. ':leases', lease_end, id)
    call('HSET', key, 'u', cmsgpack.pack(given[i + 1]))
  elseif call('ZSCORE', tag .. ':slices', id) then
    call('ZADD', tag .. ':slices', lease_end, id)
  else
    local packed = call('HGET', key, 'b')
    if not packed or cmsgpack.unpack(packed)[LABEL] == '' then
      unknown[#unknown + 1] = id
    end
  end
end
return unknown
