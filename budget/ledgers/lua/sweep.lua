-- Settles holds whose lease is over at what they last reported, and forgets which holds of an owner ended long ago.
-- Only the owner asks for that: while it cannot reach these books, it may not know yet that they have its settlements.
-- ARGV: now, how many at most, owner.
-- Returns: how many.

local leases = tag .. ':leases'
local late = call('ZRANGEBYSCORE', leases, '-inf', exact(now_s), 'LIMIT', 0, ARGV[2])
for _, id in ipairs(late) do
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
end
call('ZREMRANGEBYSCORE', tag .. ':ended:' .. ARGV[3], '-inf', exact(now_s - ENDED_S))
return #late
