#!lua name=headgate_7

-- The number in the library's and the functions' names is the calling convention. Raise it, here and in connection.py, when
-- the keys or arguments of a function change: then processes of both versions work side by side during an upgrade.
--
-- Every move that must be atomic or fenced. A move is refused by comparison inside the same script, never by a lock.
-- Redis' clients may send a move again after a lost reply, so each one recognises its own repetition.
--
-- request:<id> is a hash: state entry attempt endpoint epoch job tokens cancelled outcome result_stream result_entry
--   and of one that was ever served in two legs also leg handovers kept
--   state    queued | waiting | assigned | running | terminal
--   attempt  the fence: a worker's late write carries an older one, or finds another state
--   leg      whole | prefill | decode: of the last attempt; without it, whole
--   handovers  how many prefill legs have done their part; kept: the last one's entry in `rewards`, which says who has its KV
-- All keys arrive in KEYS and share one hash tag. A list of fields travels as one argument: a MessagePack array of field, value, ...
-- and '' where there are none.
--
-- What somebody waits for comes in a move of its own with little else in it: to a lonely request every command, every list and
-- every field is code and memory that no cache holds any more.

local function now_ms()
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end

local function add(key, packed, keep) -- one entry of these packed fields
  if keep and keep > 0 then
    return redis.call('XADD', key, 'MAXLEN', '~', keep, '*', unpack(cmsgpack.unpack(packed)))
  end
  return redis.call('XADD', key, '*', unpack(cmsgpack.unpack(packed)))
end

-- An entry of a token log, whose first fields are `attempt` and `index`. What was written before and is not here any more,
-- `held` pieces of `index`, Redis has lost, and only now can it be seen.
local function say(key, packed, held)
  local fields = cmsgpack.unpack(packed)
  local lost = tonumber(fields[4]) - tonumber(held or 0)
  if lost > 0 then
    fields[#fields + 1] = 'lost'
    fields[#fields + 1] = lost
  end
  redis.call('XADD', key, '*', unpack(fields))
end

local function is_leader(key, epoch)
  return redis.call('HGET', key, 'epoch') == epoch
end

local function holds(state, endpoint, attempt, want_endpoint, want_attempt)
  return (state == 'assigned' or state == 'running') and endpoint == want_endpoint and attempt == want_attempt
end

-- Leadership -------------------------------------------------------------------------------------------------------

-- KEYS leader / ARGV node ttl_ms epoch(0: none) -> {epoch or 0, holder, until}
local function lead(keys, args)
  local held = redis.call('HMGET', keys[1], 'node', 'epoch', 'until')
  local now, epoch, till = now_ms(), tonumber(held[2] or 0), tonumber(held[3] or 0)
  local mine = tonumber(args[3])
  if mine > 0 and mine == epoch then
    redis.call('HSET', keys[1], 'until', now + args[2])
    return {epoch, args[1], now + args[2]}
  end
  -- A lease that ends much later than any is given was given before the clock was put back: who waited for it waited for hours.
  if till > now and till - now <= 100 * args[2] then return {0, held[1], till} end
  -- Time-based, so that a failover to a replica that missed a write can not hand an epoch out twice.
  epoch = math.max(epoch + 1, now)
  redis.call('HSET', keys[1], 'node', args[1], 'epoch', string.format('%d', epoch), 'until', now + args[2])
  return {epoch, args[1], now + args[2]}
end

-- KEYS leader / ARGV epoch(0: whichever this node has) node
local function resign(keys, args)
  local is_ours = args[1] == '0' and redis.call('HGET', keys[1], 'node') == args[2]
  if not is_ours and not is_leader(keys[1], args[1]) then return 0 end
  redis.call('HSET', keys[1], 'until', 0)
  return 1
end

-- KEYS leader snapshot / ARGV epoch data
local function save(keys, args)
  if not is_leader(keys[1], args[1]) then return -1 end
  redis.call('SET', keys[2], args[2])
  return 1
end

-- A client's moves -------------------------------------------------------------------------------------------------

-- KEYS request requests body waiting / ARGV id limit body_ttl_ms claim score fields
-- -> {1, entry} new; {0, entry} it exists; {-1, waiting} full
local function submit(keys, args)
  local entry = redis.call('HGET', keys[1], 'entry')
  if entry then return {0, entry} end
  local limit = tonumber(args[2])
  if limit > 0 then
    local waiting = redis.call('ZCARD', keys[4])
    if waiting >= limit then return {-1, waiting} end
  end
  if args[4] ~= '' then redis.call('SET', keys[3], args[4], 'PX', args[3]) end
  entry = add(keys[2], args[6])
  redis.call('HSET', keys[1], 'state', 'queued', 'entry', entry)
  redis.call('ZADD', keys[4], args[5], args[1])
  return {1, entry}
end

-- KEYS request controls / ARGV id fields -> 1 asked; 0 already terminal; -1 unknown
local function cancel(keys, args)
  local state = redis.call('HGET', keys[1], 'state')
  if not state then return -1 end
  if state == 'terminal' then return 0 end
  redis.call('HSET', keys[1], 'cancelled', '1')
  add(keys[2], args[2])
  return 1
end

-- Its log goes with the record: who reads on would have the old text before the new, and its end between them.
-- KEYS dead request requests tokens / ARGV dead_entry fields -> entry; 0 no such entry; -1 the request lives
local function requeue(keys, args)
  local state = redis.call('HGET', keys[2], 'state')
  if state and state ~= 'terminal' then return -1 end
  if redis.call('XDEL', keys[1], args[1]) == 0 then return 0 end
  redis.call('DEL', keys[2], keys[4])
  return add(keys[3], args[2])
end

-- The dispatcher's moves -------------------------------------------------------------------------------------------

-- KEYS leader request requests waiting / ARGV epoch group id entry score
-- -> 1 it is this entry's; 2 and its tombstone is set; 0 a duplicate, acknowledged; -1 fenced
local function accept(keys, args)
  if not is_leader(keys[1], args[1]) then return -1 end
  local held = redis.call('HMGET', keys[2], 'entry', 'state', 'cancelled')
  if held[1] and held[1] ~= args[4] or held[2] == 'terminal' then
    redis.call('XACK', keys[3], args[2], args[4])
    return 0
  end
  if not held[2] or held[2] == 'queued' then
    redis.call('HSET', keys[2], 'state', 'waiting', 'entry', args[4])
    redis.call('ZADD', keys[4], args[5], args[3])
  end
  return held[3] and 2 or 1
end

-- One that was read in this very step needs no `accept` before: its being assigned says that it was read. If it is
-- refused, an `accept` follows, which says why.
-- KEYS leader request jobs waiting
-- ARGV epoch id entry endpoint attempt endpoint_epoch is_new leg job
-- -> the job's entry; 0 refused; -1 fenced
local function assign(keys, args)
  if not is_leader(keys[1], args[1]) then return -1 end
  local held = redis.call('HMGET', keys[2], 'state', 'entry', 'endpoint', 'attempt', 'job', 'cancelled', 'leg')
  local is_ours = held[2] == args[3]
  if is_ours and holds(held[1], held[3], held[4], args[4], args[5]) then return held[5] end -- said before
  local is_new = args[7] == '1' and (not held[1] or held[1] == 'queued') and (not held[2] or is_ours)
  if not is_new and (held[1] ~= 'waiting' or not is_ours) or held[6] then return 0 end
  -- An attempt is handed over once: a repetition that comes after its return must not start it again.
  if tonumber(held[4] or 0) >= tonumber(args[5]) then return 0 end
  local entry = add(keys[3], args[9])
  redis.call('HSET', keys[2], 'state', 'assigned', 'entry', args[3], 'endpoint', args[4], 'attempt', args[5],
    'epoch', args[6], 'job', entry)
  redis.call('ZREM', keys[4], args[2])
  if args[8] ~= (held[7] or 'whole') then redis.call('HSET', keys[2], 'leg', args[8]) end
  return entry
end

-- KEYS leader request jobs waiting decisions / ARGV epoch id endpoint attempt group score keep decision
-- -> 1 taken back; 0 there is nothing to take; -1 fenced
local function reclaim(keys, args)
  if not is_leader(keys[1], args[1]) then return -1 end
  local held = redis.call('HMGET', keys[2], 'state', 'endpoint', 'attempt', 'job')
  if held[1] == 'waiting' and held[3] == args[4] then return 1 end -- said before
  local has_ended = held[1] == 'terminal' and held[2] == args[3] and held[3] == args[4] -- perhaps not settled: see `finish`
  if not has_ended and not holds(held[1], held[2], held[3], args[3], args[4]) then return 0 end
  redis.call('XACK', keys[3], args[5], held[4])
  redis.call('XDEL', keys[3], held[4])
  if has_ended then return 0 end
  redis.call('HSET', keys[2], 'state', 'waiting', 'endpoint', '', 'job', '')
  redis.call('ZADD', keys[4], args[6], args[2])
  add(keys[5], args[8], tonumber(args[7]))
  return 1
end

-- The one terminal record, and the end of the token log with it: who has the one need not wait for the other.
local function terminal(request, reply, tokens, how)
  local entry = add(reply, how.result)
  redis.call('HSET', request, 'state', 'terminal', 'entry', how.entry, 'outcome', how.outcome,
    'result_stream', reply, 'result_entry', entry)
  redis.call('PEXPIRE', request, how.ttl)
  if how.is_private then redis.call('PEXPIRE', reply, how.ttl) end
  if how.last ~= '' then
    say(tokens, how.last, how.pieces)
    redis.call('PEXPIRE', tokens, how.ttl)
  end
end

-- KEYS leader request requests waiting reply body tokens dead
-- ARGV epoch group id entry outcome ttl_ms is_private result last dead -> 1; 0 not its to end; -1 fenced
local function conclude(keys, args)
  if not is_leader(keys[1], args[1]) then return -1 end
  local held = redis.call('HMGET', keys[2], 'state', 'entry', 'outcome')
  if held[1] == 'terminal' and held[2] == args[4] and held[3] == args[5] then return 1 end -- said before
  if held[1] == 'terminal' or held[1] == 'assigned' or held[1] == 'running' or held[2] and held[2] ~= args[4] then
    if held[2] ~= args[4] or held[1] == 'terminal' then redis.call('XACK', keys[3], args[2], args[4]) end
    return 0
  end
  terminal(keys[2], keys[5], keys[7], {entry = args[4], outcome = args[5], ttl = args[6], is_private = args[7] == '1',
    result = args[8], last = args[9]})
  redis.call('XACK', keys[3], args[2], args[4])
  redis.call('ZREM', keys[4], args[3])
  if args[10] ~= '' then add(keys[8], args[10]) else redis.call('DEL', keys[6]) end -- a dead one keeps its body for a requeue
  return 1
end

-- Append to a log or to a worker's ear; repeated after a lost reply it may stand there twice, and harms nobody.
-- KEYS leader stream / ARGV epoch keep(0: all) fields, fields, ... -> how many; -1 fenced
local function log(keys, args)
  if not is_leader(keys[1], args[1]) then return -1 end
  local keep = tonumber(args[2])
  for at = 3, #args do add(keys[2], args[at], keep) end
  return #args - 2
end

-- KEYS stream / ARGV group consumer idle_ms -> 1 removed; 0 it is needed, or unknown
local function retire(keys, args)
  for _, row in ipairs(redis.call('XINFO', 'CONSUMERS', keys[1], args[1])) do
    local is = {}
    for i = 1, #row, 2 do is[row[i]] = row[i + 1] end
    if is.name == args[2] and is.pending == 0 and is.idle > tonumber(args[3]) then
      redis.call('XGROUP', 'DELCONSUMER', keys[1], args[1], args[2])
      return 1
    end
  end
  return 0
end

-- A worker's moves -------------------------------------------------------------------------------------------------

-- KEYS endpoint / ARGV worker -> the new epoch
local function join(keys, args)
  local epoch = math.max(tonumber(redis.call('HGET', keys[1], 'epoch') or 0) + 1, now_ms())
  redis.call('HSET', keys[1], 'epoch', string.format('%d', epoch), 'worker', args[1])
  return epoch
end

-- The endpoint's stream of jobs lives as long as its glance: of one that is gone for good nothing stays.
-- KEYS endpoint beats jobs / ARGV epoch keep ttl_ms glance beat -> 1; 0 a newer worker has joined
local function beat(keys, args)
  if redis.call('HGET', keys[1], 'epoch') ~= args[1] then return 0 end
  redis.call('HSET', keys[1], unpack(cmsgpack.unpack(args[4])))
  redis.call('PEXPIRE', keys[1], args[3])
  redis.call('PEXPIRE', keys[3], args[3])
  add(keys[2], args[5], tonumber(args[2]))
  return 1
end

-- Words to cancel that were heard, and jobs of an older epoch: nobody needs them any more. A predecessor that was frozen is
-- still handed entries, and what was meant for its successor it must leave there.
-- KEYS endpoint jobs / ARGV epoch group entry, entry, ... -> how many went; 0 none were left, or a newer worker has joined
local function dismiss(keys, args)
  if redis.call('HGET', keys[1], 'epoch') ~= args[1] then return 0 end
  local gone = 0
  for at = 3, #args do
    redis.call('XACK', keys[2], args[2], args[at])
    gone = gone + redis.call('XDEL', keys[2], args[at])
  end
  return gone
end

-- Behind pieces that were just refused, for want of memory perhaps, nothing of the same log may be taken: what then lacks Redis
-- has not lost, and it is on its way. A worker says which moves are behind others in one round trip.
local function is_torn(index, held, is_behind)
  return is_behind == '1' and tonumber(index) > tonumber(held or 0)
end
local TORN = 'TORN the pieces before it were refused'

-- KEYS request / ARGV endpoint attempt -> 1 go; 2 cancelled meanwhile; 0 no longer yours
local function start(keys, args)
  local held = redis.call('HMGET', keys[1], 'state', 'endpoint', 'attempt', 'cancelled')
  if not holds(held[1], held[2], held[3], args[1], args[2]) then return 0 end
  redis.call('HSET', keys[1], 'state', 'running')
  return held[4] and 2 or 1
end

-- KEYS request tokens / ARGV endpoint attempt index pieces ttl_ms fields is_behind -> 1; 0 no longer yours
local function tokens(keys, args)
  local held = redis.call('HMGET', keys[1], 'state', 'endpoint', 'attempt', 'tokens')
  if not holds(held[1], held[2], held[3], args[1], args[2]) then return 0 end
  if tonumber(held[4] or 0) > tonumber(args[3]) then return 1 end -- said before
  if is_torn(args[3], held[4], args[7]) then return redis.error_reply(TORN) end
  say(keys[2], args[6], held[4])
  redis.call('HSET', keys[1], 'tokens', args[3] + args[4])
  if held[4] then redis.call('PEXPIRE', keys[2], args[5]) end -- not with the first, which is waited for; its end sets it
  return 1
end

-- Behind a hole nothing can be said that goes on from what was: the attempt says all of it anew, in a log of its own.
-- KEYS request tokens / ARGV endpoint attempt -> 1; 0 no longer yours
local function rewind(keys, args)
  local held = redis.call('HMGET', keys[1], 'state', 'endpoint', 'attempt')
  if not holds(held[1], held[2], held[3], args[1], args[2]) then return 0 end
  redis.call('DEL', keys[2])
  redis.call('HDEL', keys[1], 'tokens')
  return 1
end

-- What is told of a death, and behind it the request as its client wrote it: a worker knows only what its job says.
local function buried(requests, entry, packed)
  local own = redis.call('XRANGE', requests, entry, entry)[1]
  if not own then return packed end
  local dead, fields = cmsgpack.unpack(packed), {}
  for i = 1, 10 do fields[i] = dead[i] end -- dead_stream, dead_entry, dead_reason, dead_outcome and id
  for i = 1, #own[2], 2 do
    if own[2][i] ~= 'id' then
      fields[#fields + 1] = own[2][i]
      fields[#fields + 1] = own[2][i + 1]
    end
  end
  return cmsgpack.pack(fields)
end

-- The end, as far as somebody waits for it; `settle` follows. A worker that dies between them leaves a reward unwritten and
-- nothing else: the job and the request's entry are pending still, and whoever takes them up finds the request ended.
-- KEYS request reply tokens dead requests / ARGV endpoint attempt entry outcome ttl_ms is_private result last dead is_behind
-- -> 1; 0 no longer yours
local function finish(keys, args)
  local held = redis.call('HMGET', keys[1], 'state', 'endpoint', 'attempt', 'tokens')
  if not holds(held[1], held[2], held[3], args[1], args[2]) then
    return held[1] == 'terminal' and held[2] == args[1] and held[3] == args[2] and 1 or 0
  end
  if args[8] ~= '' and is_torn(cmsgpack.unpack(args[8])[4], held[4], args[10]) then return redis.error_reply(TORN) end
  terminal(keys[1], keys[2], keys[3], {entry = args[3], outcome = args[4], ttl = args[5], is_private = args[6] == '1',
    result = args[7], last = args[8], pieces = held[4]})
  if args[9] ~= '' then add(keys[4], buried(keys[5], args[3], args[9])) end
  return 1
end

-- The rest of an end, right behind `finish`. Where that was refused, nothing is settled but the stale job.
-- KEYS request jobs requests body rewards / ARGV endpoint attempt worker_group job group entry is_dead keep reward
-- -> 1; 0 said before, or somebody else has taken the job up: no second reward
local function settle(keys, args)
  local held = redis.call('HMGET', keys[1], 'state', 'endpoint', 'attempt')
  if holds(held[1], held[2], held[3], args[1], args[2]) then return redis.error_reply('ERR it has not ended') end
  local was_pending = redis.call('XACK', keys[2], args[3], args[4])
  if was_pending == 1 then redis.call('XDEL', keys[2], args[4]) end
  if held[1] == 'terminal' and held[2] == args[1] and held[3] == args[2] then
    redis.call('XACK', keys[3], args[5], args[6])
    if args[7] ~= '1' then redis.call('DEL', keys[4]) end -- a dead request keeps its body for a requeue
    if was_pending == 1 then add(keys[5], args[9], tonumber(args[8])) end
  end
  return was_pending
end

-- KEYS request jobs waiting rewards kv / ARGV endpoint attempt job group id score keep reward kv_params kv_ttl_ms
-- -> 1; 0 no longer yours. Of a prefill leg that has done its part, kv_params say where its KV is; of others they are empty.
local function hand_back(keys, args)
  local held = redis.call('HMGET', keys[1], 'state', 'endpoint', 'attempt')
  redis.call('XACK', keys[2], args[4], args[3])
  redis.call('XDEL', keys[2], args[3])
  if not holds(held[1], held[2], held[3], args[1], args[2]) then return 0 end
  redis.call('HSET', keys[1], 'state', 'waiting', 'endpoint', '', 'job', '')
  redis.call('ZADD', keys[3], args[6], args[5])
  local entry = add(keys[4], args[8], tonumber(args[7]))
  if args[9] ~= '' then
    redis.call('SET', keys[5], args[9], 'PX', args[10])
    redis.call('HINCRBY', keys[1], 'handovers', 1)
    redis.call('HSET', keys[1], 'kept', entry)
  end
  return 1
end

-- Who leads cuts the logs: a Redis that is full must not stand without anybody. Who rewinds one frees memory.
redis.register_function{function_name = 'hg7_lead', callback = lead, flags = {'allow-oom'}}
redis.register_function{function_name = 'hg7_resign', callback = resign, flags = {'allow-oom'}}
redis.register_function('hg7_save', save)
redis.register_function('hg7_submit', submit)
redis.register_function('hg7_cancel', cancel)
redis.register_function('hg7_requeue', requeue)
redis.register_function('hg7_accept', accept)
redis.register_function('hg7_assign', assign)
redis.register_function('hg7_reclaim', reclaim)
redis.register_function('hg7_conclude', conclude)
redis.register_function('hg7_log', log)
redis.register_function('hg7_retire', retire)
redis.register_function('hg7_join', join)
redis.register_function('hg7_beat', beat)
redis.register_function('hg7_dismiss', dismiss)
redis.register_function('hg7_start', start)
redis.register_function('hg7_tokens', tokens)
redis.register_function{function_name = 'hg7_rewind', callback = rewind, flags = {'allow-oom'}}
redis.register_function('hg7_finish', finish)
redis.register_function('hg7_settle', settle)
redis.register_function('hg7_hand_back', hand_back)
