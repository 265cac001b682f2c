/*
 * Read before arch/x86/kernel/alternative.c: calls by retpoline stay as the compiler made them.
 *
 * Linux visits each of 5,500 such calls at boot, on 1,229 pages of the kernel's text, to write another one in its place where the CPU needs
 * no retpoline. Left as it is, a call goes to its thunk (arch/x86/lib/retpoline.S), and the thunk is patched, once, to what the CPU
 * needs: a retpoline, or a plain indirect jump, so that a call is as safe as ever and one direct jump longer.
 *
 * Where the sites are is known to a kernel built with objtool; this one file is to believe that it was not.
 */
#include <linux/compiler.h>
#include <linux/objtool.h>
#undef CONFIG_OBJTOOL
