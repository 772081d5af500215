"""``convert`` whole models: layers become ours in place, and who calls them fuses what follows."""
