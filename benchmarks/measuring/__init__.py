"""How things are measured: what is timed, checked, remembered and recorded, whatever it computes."""
