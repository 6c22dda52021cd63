"""Every message that crosses Redis, as a Struct; `codec` turns each into flat text fields.

The life of a request in messages:
    1. `Request`   client -> `requests`
    2. `Job`       dispatcher -> `jobs:<endpoint>`
    3. `Beat`      worker -> `beats`: alive, what it can do, what has started and given its first token
    4. `Tokens`    worker -> `tokens:<id>`, when the request streams
    5. `Result`    worker or dispatcher -> `results` or the request's `reply_to`: exactly one
    6. `Reward`    worker -> `rewards`: what this attempt cost
and beside it `Control` (what people ask for), `Decision` (why it went there) and `Dead` (what could not be served).

Names end in their unit: `ttft_s` here is `ttft_ms` on the wire, `finished_at` is unix milliseconds on the wire.

Each message is in the module of who writes it: `client`, `dispatcher`, `worker`; what they share is in `words`.
"""
