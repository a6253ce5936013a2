-- Settles holds whose lease is over at what they last reported; forgets usage that is too old, and which holds of an
-- owner ended long ago. Only the owner asks for that: while it cannot reach these books, it may not know yet that they have its settlements.
-- Given: how many at most, owner, the longest lease of a hold in s, and of a slice. A lease that is longer was
-- given by a clock that was ahead.
-- Returns: how many.

local most, owner, longest_s, longest_slice_s = unpack(cmsgpack.unpack(ARGV[1]))
local swept = 0

local function sweep(leases, lease_s)
  local longest = exact(now_s + lease_s)
  for _, id in ipairs(call('ZRANGEBYSCORE', leases, '(' .. longest, '+inf', 'LIMIT', 0, most)) do
    call('ZADD', leases, longest, id)
  end
  for _, id in ipairs(call('ZRANGEBYSCORE', leases, '-inf', exact(now_s), 'LIMIT', 0, most)) do
    local key = tag .. ':h:' .. id
    local packed, reported = unpack(call('HMGET', key, 'b', 'u'))
    if packed then
      local record = cmsgpack.unpack(packed)
      reported = reported or cmsgpack.pack({0, 0, 0, record[LABEL] ~= '' and 1 or 0}) -- a slice is no request
      close(record, cmsgpack.unpack(reported))
      call('HSET', key, 'x', reported)
      call('EXPIRE', key, SILENT_S)
    end
    call('ZREM', leases, id)
    swept = swept + 1
  end
end

for _, day in ipairs(call('ZRANGEBYSCORE', tag .. ':days', '-inf', floor(now_s / 86400) - KEPT_DAYS)) do
  call('DEL', tag .. ':u:' .. day)
  call('ZREM', tag .. ':days', day)
end
sweep(tag .. ':leases', longest_s)
sweep(tag .. ':slices', longest_slice_s)
call('ZREMRANGEBYSCORE', tag .. ':ended:' .. owner, '-inf', exact(now_s - ENDED_S))
return swept
