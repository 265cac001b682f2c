/*
 * Read before arch/x86/pci/direct.c: PCI configuration space is read from a copy of it in memory, where the machine keeps one.
 *
 * Linux reads some 600 registers to find four functions, and each is two exits, one for the port that says which and one for the
 * port that says what. Our VMM writes what they say into memory below 1 MiB that no memory map has, and writes it again before the guest
 * goes on whenever it changes (devices/src/pci/copy.rs). A machine without the mark has no copy, and is asked by the ports. Writes always
 * go by the ports.
 */
#include <linux/io.h>
#include <linux/pci.h>

/* Where the mark and the copy of bus 0 are, 256 bytes for each function, and what the mark is: "PCI copy". */
#define CONFIG_COPY_MARK 0xdfff8
#define CONFIG_COPY 0xe0000
#define CONFIG_COPY_MAGIC 0x79706f6320494350ul

/* What the code below has written to port 0xCF8 last. */
static u32 config_copy_address;

/* Where the copy has what `port`, one of 0xCFC to 0xCFF, would say; NULL if that is not of bus 0, or there is no copy. */
static inline void *config_copy_of(u16 port)
{
	u32 address = config_copy_address;

	if ((address & 0xffff0000) != 0x80000000 ||
	    READ_ONCE(*(u64 *)isa_bus_to_virt(CONFIG_COPY_MARK)) != CONFIG_COPY_MAGIC)
		return NULL;
	return isa_bus_to_virt(CONFIG_COPY + (address & 0xfffc) + (port & 3));
}

static inline bool config_copy_data(u16 port)
{
	return (port & ~3) == 0xcfc;
}

static inline void config_copy_select(u16 port)
{
	if (config_copy_data(port) || port == 0xcf8)
		outl(config_copy_address, 0xcf8);
}

#define CONFIG_COPY_IN(name, type)					\
static inline type config_copy_##name(u16 port)				\
{									\
	void *copy = config_copy_data(port) ? config_copy_of(port) : NULL; \
									\
	if (copy)							\
		return READ_ONCE(*(type *)copy);			\
	config_copy_select(port);					\
	return name(port);						\
}

#define CONFIG_COPY_OUT(name, type)					\
static inline void config_copy_##name(type value, u16 port)		\
{									\
	if (config_copy_data(port))					\
		config_copy_select(port);				\
	name(value, port);						\
}

CONFIG_COPY_IN(inb, u8)
CONFIG_COPY_IN(inw, u16)
CONFIG_COPY_OUT(outb, u8)
CONFIG_COPY_OUT(outw, u16)
CONFIG_COPY_IN(inl, u32)
CONFIG_COPY_OUT(outl, u32)

static inline void config_copy_outl_or_address(u32 value, u16 port)
{
	if (port == 0xcf8)
		config_copy_address = value;
	else
		config_copy_outl(value, port);
}

#undef inb
#undef inw
#undef inl
#undef outb
#undef outw
#undef outl
#define inb config_copy_inb
#define inw config_copy_inw
#define inl config_copy_inl
#define outb config_copy_outb
#define outw config_copy_outw
#define outl config_copy_outl_or_address
