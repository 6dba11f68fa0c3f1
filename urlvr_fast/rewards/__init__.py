"""Rewards: callables `reward(batch, policy) -> (B,) float tensor`, none of which can see an answer but the oracle in `external`."""
