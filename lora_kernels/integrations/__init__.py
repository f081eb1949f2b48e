"""What lora_kernels knows about other libraries; none of them is imported before it is needed."""
