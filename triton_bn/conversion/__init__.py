"""``convert`` whole models: which layers become ours, what they may be fused with, how a forward is read."""
