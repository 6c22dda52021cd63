"""How an endpoint is chosen, composed of parts: fetchers, filters, scorers and a picker, in llm-d's words."""
