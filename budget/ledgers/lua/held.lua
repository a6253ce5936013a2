-- Sums up open holds.
-- Given: the first to look at, and how many.
-- Returns: how many there were, and their tokens, thinking tokens and nano-USD.

local first, most = unpack(cmsgpack.unpack(ARGV[1]))
local sum = {0, 0, 0, 0}
for _, id in ipairs(call('ZRANGE', tag .. ':leases', first, first + most - 1)) do
  local packed = call('HGET', tag .. ':h:' .. id, 'b')
  sum[1] = sum[1] + 1
  if packed then
    local amounts = cmsgpack.unpack(packed)[AMOUNTS]
    sum[2], sum[3], sum[4] = sum[2] + amounts[1], sum[3] + amounts[2], sum[4] + amounts[3]
  end
end
return sum
