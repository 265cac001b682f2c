/*
 * Read before mm/slub.c: the caches are not shown in /sys/kernel/slab, which is 3,200 of the 5,400 files that sysfs has at boot.
 *
 * What is left out is the one late initcall of that file, which does nothing else; with it left out the allocator stays in the state in
 * which it serves the rest of the boot. `initcall_blacklist=` on the command line does the same, but looks up the name of each initcall.
 */
#include <linux/init.h>
#undef late_initcall
#define late_initcall(call) static initcall_t left_out_##call __maybe_unused = call
