"""The server side: round loop, policy, aggregation, strategies, selection."""
