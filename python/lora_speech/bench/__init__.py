"""`lora-speech bench`: this CPU path against its strongest peers, in turns, in one run.

`settings` what is asked, `workload` the models, `systems` and `peers` the contestants, `measure`
their turns, `whole_model`, `linear` and `train` the comparisons, `suite` all of it as one record,
`tables` and `plots` how the record is shown.
"""
