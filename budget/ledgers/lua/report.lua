-- Renews the leases of holds and notes what they have used so far.
-- ARGV: now, lease in s, then for each: id, four amounts joined by spaces.
-- Returns: the ids that are unknown. One that was swept stays so: its settlement will correct it.

local lease_end, unknown = exact(now_s + ARGV[2]), {}
for i = 3, #ARGV - 1, 2 do
  local id = ARGV[i]
  local key = tag .. ':h:' .. id
  if call('ZSCORE', tag .. ':leases', id) then
    call('ZADD', tag .. ':leases', lease_end, id)
    call('HSET', key, 'u', ARGV[i + 1])
  elseif call('ZSCORE', tag .. ':slices', id) then
    call('ZADD', tag .. ':slices', lease_end, id)
  elseif call('EXISTS', key) == 0 then
    unknown[#unknown + 1] = id
  end
end
return unknown
