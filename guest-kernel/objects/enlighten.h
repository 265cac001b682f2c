/*
 * Read before arch/x86/platform/pvh/enlighten.c: a guest that enters by PVH does not look for Xen, of which this kernel knows nothing
 * else. Linux asks for each of 256 CPUID leaves at which a hypervisor could begin, and each is an exit.
 */
#include <asm/xen/hypervisor.h>

/* A function, so that the kernel's symbols show it. */
static __init __attribute__((__noipa__)) u32 xen_is_not_looked_for(void)
{
	return 0;
}

#define xen_cpuid_base() xen_is_not_looked_for()
