-- Posts the lines of a file in turn; with "ids", each request under another X-Request-ID.
-- There is no response() here: with one, wrk hands every answer to Lua, which costs more than the request.
-- Answers of status 400 and more are counted by wrk itself.

local requests, heads, tails = {}, {}, {}
local count, turn, ids = 0, 0, false

function init(arguments)
   ids = arguments[2] == "ids"
   wrk.headers["Content-Type"] = "application/json"
   for body in io.lines(arguments[1]) do
      local request = wrk.format("POST", nil, nil, body)
      local line = request:find("\r\n", 1, true)
      count = count + 1
      requests[count] = request
      heads[count] = request:sub(1, line + 1) .. "X-Request-ID: "
      tails[count] = request:sub(line)
   end
end

function request()
   turn = turn + 1
   local place = turn % count + 1
   if ids then
      -- 32 characters, as proxies send
      return heads[place] .. "5f0c2ab94d7e4c1f83" .. 10000000000000 + turn .. tails[place]
   end
   return requests[place]
end

function done(summary, latency, _)
   local errors = summary.errors
   io.write(string.format(
      'wrk-figures {"requests": %d, "microseconds": %d, "p50": %.0f, "p99": %.0f, ' ..
      '"connect": %d, "read": %d, "write": %d, "status": %d, "timeout": %d}\n',
      summary.requests, summary.duration, latency:percentile(50), latency:percentile(99),
      errors.connect, errors.read, errors.write, errors.status, errors.timeout))
end
