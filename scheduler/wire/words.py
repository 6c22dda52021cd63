"""Words and bounds that messages share, whoever writes them."""

import re
from typing import Literal

Outcome = Literal["completed", "expired", "rejected", "cancelled", "failed", "invalid"]
"How a request ends. Exactly one a request, the same words wherever a person meets them."

Leg = Literal["whole", "prefill", "decode"]
"What part of a request a job is."

EndpointState = Literal["ready", "draining", "away"]
"`ready` takes work, `draining` finishes what it has, `away`: the worker lives but its engine does not."

PATHS = ("/v1/chat/completions", "/v1/completions")
"Where a body may be posted on an engine."

PRIORITY_MAX = 1_000_000
"Of a request or an objective, above 0 or below."

ID_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@-]{0,127}")
"An id is part of key names and is typed by people: no spaces, no braces, at most 128 characters."

ENDPOINT_PATTERN = re.compile(r"[^\s=\x00-\x1f\x7f]{1,128}")
"An endpoint's name stands in lists of words, before an `=`."

KV_PARAMS_BYTES = 131_072
"The longest `kv_transfer_params` that are carried: an engine that names more blocks prefills for nobody."

BLOCKS_MAX = 512
"The most prefix blocks a request may bring; the rest of a longer prompt cannot be matched."
