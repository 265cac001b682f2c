/*
 * Read before arch/x86/pci/early.c, whose functions look for devices with quirks in each slot long before the bus is enumerated: as
 * before direct.c.
 */
#define config_copy_address early_config_copy_address
#include "direct.h"
