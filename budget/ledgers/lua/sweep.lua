-- Settles holds whose lease is over at what they last reported, and forgets which holds of an owner ended long ago.
-- Only the owner asks for that: while it cannot reach these books, it may not know yet that they have its settlements.
-- ARGV: now, how many at most, owner, the longest lease of a hold in s, and of a slice. A lease that is longer was
-- given by a clock that was ahead.
-- Returns: how many.

local most, swept = ARGV[2], 0

local function sweep(leases, longest_s)
  local longest = exact(now_s + longest_s)
  for _, id in ipairs(call('ZRANGEBYSCORE', leases, '(' .. longest, '+inf', 'LIMIT', 0, most)) do
    call('ZADD', leases, longest, id)
  end
  for _, id in ipairs(call('ZRANGEBYSCORE', leases, '-inf', exact(now_s), 'LIMIT', 0, most)) do
    local key = tag .. ':h:' .. id
    local packed, reported = unpack(call('HMGET', key, 'b', 'u'))
    if packed then
      local record = cmsgpack.unpack(packed)
      reported = reported or unreported(record)
      close(record, last_report(reported))
      call('HSET', key, 'x', reported)
      call('EXPIRE', key, SILENT_S)
    end
    call('ZREM', leases, id)
    swept = swept + 1
  end
end

sweep(tag .. ':leases', ARGV[4])
sweep(tag .. ':slices', ARGV[5])
call('ZREMRANGEBYSCORE', tag .. ':ended:' .. ARGV[3], '-inf', exact(now_s - ENDED_S))
return swept
