// lora_kernels_switch_fiber(save, load): leaves one stack, whose pointer goes to *save, for another, at `load`. What a
// call need not preserve is not saved: control words, six registers, and where to return.
#if defined(__x86_64__)
asm(R"(
.text
.globl lora_kernels_switch_fiber
.hidden lora_kernels_switch_fiber
.type lora_kernels_switch_fiber,@function
lora_kernels_switch_fiber:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  subq $8,%rsp
  stmxcsr (%rsp)
  fnstcw 4(%rsp)
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  ldmxcsr (%rsp)
  fldcw 4(%rsp)
  addq $8,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size lora_kernels_switch_fiber,.-lora_kernels_switch_fiber
)");
#else
#error "csrc/cuda/emulation: write lora_kernels_switch_fiber for this processor"
#endif
