"""The command line: `app` holds the commands, `export` and `finetune` those with many options."""
