"""What the dashboard shows: a panel is a line of `ROWS`, and what it asks of Prometheus.

Top to bottom they follow a request: what was promised, what waits, where it runs, what was learned, what it runs on.
"""

from typing import NamedTuple

POOL = 'pool=~"$pool"'
QUANTILES = (0.5, 0.95, 0.99)


class Panel(NamedTuple):
    """A title, what it asks Prometheus (query and legend), and how it is drawn."""

    title: str
    queries: list[tuple[str, str]]
    unit: str = "short"
    kind: str = "timeseries"
    width: int = 8
    stacked: bool = False
    about: str = ""
    top: float | None = None


def quantiles(metric: str, by: str = "pool") -> list[tuple[str, str]]:
    """The usual three of a pool's histogram, else one a label."""
    where = f"{{{POOL}}}" if by == "pool" else ""
    return [
        (
            f"histogram_quantile({q}, sum by ({by}, le) (rate({metric}_bucket{where}[$__rate_interval])))",
            f"p{q * 100:g}" if by == "pool" else f"{{{{{by}}}}} p{q * 100:g}",
        )
        for q in (QUANTILES if by == "pool" else (0.95,))
    ]


def gauge(metric: str, legend: str) -> tuple[str, str]:
    """A pool's figure, which only its leader shows."""
    return f"max by (pool) (headgate_{metric}{{{POOL}}})", legend


def endpoint(metric: str) -> list[tuple[str, str]]:
    """A figure an endpoint."""
    return [(f"max by (endpoint) (headgate_endpoint_{metric}{{{POOL}}})", "{{endpoint}}")]


def rate(metric: str, by: str, legend: str) -> tuple[str, str]:
    """A counter's growth a second."""
    return f"sum by ({by}) (rate(headgate_{metric}_total{{{POOL}}}[$__rate_interval]))", legend


def worker(metric: str) -> list[tuple[str, str]]:
    """A worker's figure, an endpoint."""
    return [(f"max by (endpoint) (headgate_worker_{metric})", "{{endpoint}}")]


def door(metric: str, *, by: str = "", legend: str = "") -> tuple[str, str]:
    """A door's counter's growth a second; doors know no pool but their own."""
    grouped = f" by ({by})" if by else ""
    return f"sum{grouped} (rate(headgate_door_{metric}_total[$__rate_interval]))", legend


def at_the_door(metric: str, legend: str) -> list[tuple[str, str]]:
    """The usual three of a door's histogram."""
    return [
        (
            f"histogram_quantile({q}, sum by (le) (rate(headgate_door_{metric}_bucket[$__rate_interval])))",
            f"{legend} p{q * 100:g}",
        )
        for q in QUANTILES
    ]


ROWS: dict[str, list[Panel]] = {
    "Promises": [
        Panel(
            "Promises kept, 5 min",
            [(f"headgate:promises:kept_ratio5m{{{POOL}}}", "{{objective}}")],
            unit="percentunit",
            kind="stat",
            width=4,
            top=1,
            about="Of all promises that ended in the last five minutes, by objective.",
        ),
        Panel("Time to first token", quantiles("headgate_ttft_seconds"), unit="s", width=7),
        Panel("Time per output token", quantiles("headgate_tpot_seconds"), unit="s", width=7),
        Panel(
            "Outcomes",
            [(f"headgate:outcomes:rate5m{{{POOL}}}", "{{outcome}}")],
            unit="reqps",
            width=6,
            stacked=True,
        ),
    ],
    "Door": [
        Panel(
            "Answers by status",
            [door("requests", by="status", legend="{{status}}")],
            unit="reqps",
            stacked=True,
        ),
        Panel(
            "Refusals by reason",
            [
                (
                    'sum by (reason) (rate(headgate_door_requests_total{reason!=""}[$__rate_interval]))',
                    "{{reason}}",
                ),
                door("streams_broken", by="reason", legend="in mid-stream: {{reason}}"),
            ],
            unit="reqps",
        ),
        Panel(
            "Open, and gone before the end",
            [
                ("sum(headgate_door_open_requests)", "open"),
                door("disconnects", legend="clients gone, a second"),
                door("cancels", legend="cancelled for that, a second"),
            ],
        ),
        Panel("First byte", at_the_door("time_to_first_byte_seconds", "first byte"), unit="s"),
        Panel("Whole answer", at_the_door("request_seconds", "whole"), unit="s"),
        Panel(
            "Hand-in",
            at_the_door("hand_in_seconds", "hand-in"),
            unit="s",
            about="From understanding a request to its being in Redis: what Redis costs a client.",
        ),
    ],
    "What waits": [
        Panel(
            "Requests",
            [
                gauge("waiting", "waiting"),
                gauge("set_aside", "set aside"),
                gauge("prefilled", "between two legs"),
                gauge("assigned", "assigned"),
                gauge("running", "running"),
            ],
            stacked=True,
            about="Set aside: cannot keep their promise as things stand; they come back when that changes.",
        ),
        Panel(
            "Backlog and oldest waiting",
            [gauge("backlog_seconds", "backlog"), gauge("oldest_waiting_seconds", "oldest")],
            unit="s",
            about="Backlog: predicted seconds of waiting work over all ready endpoints. Autoscaling follows it.",
        ),
        Panel("At risk", [gauge("requests_at_risk", "due within the backlog")]),
        Panel("End to end", quantiles("headgate_e2e_seconds"), unit="s"),
        Panel(
            "Slack when handed over or set aside",
            [
                (
                    f"histogram_quantile(0.5, sum by (stage, le) (rate(headgate_slack_seconds_bucket{{{POOL}}}[$__rate_interval])))",
                    "{{stage}} p50",
                )
            ],
            unit="s",
        ),
        Panel(
            "Tokens",
            [rate("prompt_tokens", "pool", "prompt"), rate("output_tokens", "pool", "output")],
            about="Of ended requests, a second.",
        ),
    ],
    "Endpoints": [
        Panel(
            "State",
            [
                (
                    f"max by (endpoint, state) (headgate_endpoint_state{{{POOL}}}) == 1",
                    "{{endpoint}} {{state}}",
                )
            ],
            kind="state-timeline",
        ),
        Panel(
            "Seats taken",
            [
                (
                    f"max by (endpoint) (headgate_endpoint_seats{{{POOL}}}) / max by (endpoint) (headgate_endpoint_seats_max{{{POOL}}})",
                    "{{endpoint}}",
                )
            ],
            unit="percentunit",
            top=1,
        ),
        Panel("Free in", endpoint("free_seconds"), unit="s"),
        Panel("Prefill ahead", endpoint("prefill_tokens")),
        Panel("KV tokens handed over", endpoint("kv_tokens")),
        Panel("Running in the engine, by worker", worker("jobs_running")),
    ],
    "What was learned": [
        Panel(
            "Speed",
            endpoint("speed"),
            about="Times the declared hardware's time; 1: as declared.",
        ),
        Panel("Prediction error", endpoint("prediction_error"), about="Mean absolute log error."),
        Panel(
            "First tokens within what was said",
            [
                (
                    f"sum by (quantile) (rate(headgate_forecasts_covered_total{{{POOL}}}[$__rate_interval])) / sum by (quantile) (rate(headgate_forecasts_total{{{POOL}}}[$__rate_interval]))",
                    "no later than quantile {{quantile}}",
                )
            ],
            unit="percentunit",
            top=1,
            about="Each line belongs at its own quantile: 50 % and 90 %.",
        ),
        Panel(
            "Within the 90 % bound, by endpoint",
            endpoint("prediction_coverage"),
            unit="percentunit",
            top=1,
        ),
        Panel(
            "Guard: planned by declared hardware",
            [
                *endpoint("on_prior"),
                (
                    f"sum by (pool) (increase(headgate_endpoint_guard_switches_total{{{POOL}}}[$__rate_interval]))",
                    "switches",
                ),
            ],
            about="1: what was learned of this endpoint was worse than what it declares.",
        ),
        Panel(
            "Cached prefix tokens: believed and found",
            [
                rate("best_cached_tokens", "pool", "believed on the best endpoint for it"),
                rate("selected_cached_tokens", "pool", "believed when assigned"),
                rate("reused_cached_tokens", "pool", "found by the engine"),
            ],
        ),
        Panel(
            "Learner's lag", [gauge("learner_lag_seconds", "age of the latest reward")], unit="s"
        ),
        Panel("Step-time law, error", worker("step_error_ratio"), unit="percentunit"),
    ],
    "Dispatchers": [
        Panel(
            "Leader",
            [(f"headgate_is_leader{{{POOL}}}", "{{instance}}")],
            kind="state-timeline",
        ),
        Panel("Decision time", quantiles("headgate_decide_seconds"), unit="s"),
        Panel(
            "Redis round trips a request",
            [
                (
                    f"sum by (pool) (rate(headgate_redis_round_trips_total{{{POOL}}}[$__rate_interval])) / sum by (pool) (rate(headgate_requests_total{{{POOL}}}[$__rate_interval]))",
                    "{{pool}}",
                )
            ],
        ),
        Panel(
            "Taken back, handed back, refused",
            [
                rate("lease_expiries", "pool", "leases expired"),
                rate("returns", "pool", "handed back"),
                rate("refused_moves", "move", "refused: {{move}}"),
            ],
            unit="ops",
        ),
        Panel(
            "Hand-overs and turns",
            [rate("assignments", "pool", "hand-overs"), rate("turns", "pool", "turns")],
            unit="ops",
        ),
        Panel(
            "Redis memory",
            [
                gauge("redis_memory_bytes", "used"),
                gauge("redis_memory_max_bytes", "maxmemory"),
            ],
            unit="bytes",
        ),
    ],
    "Workers and engines": [
        Panel(
            "First token, by endpoint",
            quantiles("headgate_worker_time_to_first_token_seconds", "endpoint"),
            unit="s",
        ),
        Panel(
            "Between tokens, by endpoint",
            quantiles("headgate_worker_inter_token_latency_seconds", "endpoint"),
            unit="s",
        ),
        Panel("Held, not yet in the engine", worker("jobs_held")),
        Panel(
            "Engine: running and waiting",
            [
                ("sum by (instance) (vllm:num_requests_running)", "{{instance}} running"),
                ("sum by (instance) (vllm:num_requests_waiting)", "{{instance}} waiting"),
            ],
        ),
        Panel(
            "Engine: KV cache",
            [("max by (instance) (vllm:kv_cache_usage_perc)", "{{instance}}")],
            unit="percentunit",
            top=1,
        ),
        Panel(
            "Engine: prefix cache hits",
            [
                (
                    "sum by (instance) (rate(vllm:prefix_cache_hits_total[$__rate_interval])) / sum by (instance) (rate(vllm:prefix_cache_queries_total[$__rate_interval]))",
                    "{{instance}}",
                )
            ],
            unit="percentunit",
            top=1,
        ),
    ],
}
