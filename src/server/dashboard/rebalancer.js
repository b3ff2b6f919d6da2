// The rebalancer in words.
