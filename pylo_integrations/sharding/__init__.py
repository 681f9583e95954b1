"""Where a tensor's elements live, and how sums over its pieces become sums over the whole tensor."""
