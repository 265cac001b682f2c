//! What a hostile driver does, step by step, as bytes that a fuzzer can change and a seed's maker can write.
//!
//! A program that ends in the middle of a step ends before it.

/// Reads numbers, little-endian, and bytes.
pub(crate) struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Reader<'a> {
        Reader(bytes)
    }

    pub(crate) fn u8(&mut self) -> Option<u8> {
        self.array().map(|[byte]| byte)
    }

    pub(crate) fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }

    /// A length of one or two bytes and so many bytes, or as many as there are.
    pub(crate) fn short(&mut self) -> Option<Vec<u8>> {
        let length = self.u8()?;
        Some(self.take(length.into()))
    }

    pub(crate) fn long(&mut self) -> Option<Vec<u8>> {
        let length = self.u16()?;
        Some(self.take(length.into()))
    }

    pub(crate) fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }

    fn take(&mut self, length: usize) -> Vec<u8> {
        let (taken, rest) = self.0.split_at(length.min(self.0.len()));
        self.0 = rest;
        taken.to_vec()
    }

    /// A guest address: two bytes, or with 0xff in front eight.
    fn address(&mut self) -> Option<u64> {
        match self.u8()? {
            WIDE => self.u64(),
            _ => self.u16().map(u64::from),
        }
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (array, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*array)
    }
}

/// In front of an address of eight bytes.
const WIDE: u8 = 0xff;

/// Forms of [`Act::Chain`].
pub(crate) mod shape {
    /// By an indirect table.
    pub(crate) const INDIRECT: u8 = 1;
    /// The index of the available ring stays where it is.
    pub(crate) const UNPUBLISHED: u8 = 2;
    /// With a kick.
    pub(crate) const KICK: u8 = 4;
    /// What the device reads is in pieces of 16 bytes.
    pub(crate) const PIECES: u8 = 8;
}

/// One step. Numbers of queues count round.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Act {
    /// From a reset device to DRIVER_OK.
    Up {
        /// Of all that the device and the transport offer.
        features: u64,
        /// Those that are set up, one bit each.
        queues: u32,
        /// Of each queue, as a power of two.
        size_log: u8,
    },
    /// A write of the status.
    Status(u8),
    /// One access to the common configuration.
    Common { offset: u8, width: u8, value: u64 },
    /// One access to the BAR, reading and writing.
    Bar { offset: u16, width: u8, value: u64 },
    /// One access to configuration space, reading and writing.
    Pci { offset: u8, width: u8, value: u32 },
    /// A chain as an honest driver makes it.
    Chain {
        queue: u8,
        /// See [`shape`].
        shape: u8,
        /// What the device reads.
        readable: Vec<u8>,
        /// Lengths of the buffers that it may write.
        writable: Vec<u16>,
    },
    /// A descriptor of a ring.
    Descriptor {
        queue: u8,
        slot: u8,
        address: u64,
        length: u32,
        flags: u16,
        next: u16,
    },
    /// Bytes anywhere in memory.
    Poke { address: u64, bytes: Vec<u8> },
    /// A head in the next slot of the available ring, and its index one further.
    Publish { queue: u8, head: u16 },
    /// The index of the available ring.
    Index { queue: u8, index: u16 },
    /// The flags of the available ring and `used_event`.
    Events { queue: u8, flags: u16, event: u16 },
    /// A notification.
    Kick(u8),
    /// The device gets one turn of the event loop.
    Turn,
    /// It gets as many as it wants.
    Settle,
    /// A reset by the status.
    Reset,
    /// Something of the target's own.
    Own { kind: u8, bytes: Vec<u8> },
    /// The host suspends the device and has it go on.
    Pause,
}

const KINDS: u8 = 17;

impl Act {
    pub(crate) fn read(reader: &mut Reader<'_>) -> Option<Act> {
        Some(match reader.u8()? % KINDS {
            0 => Act::Up {
                features: reader.u64()?,
                queues: reader.u32()?,
                size_log: reader.u8()?,
            },
            1 => Act::Status(reader.u8()?),
            2 => Act::Common {
                offset: reader.u8()?,
                width: reader.u8()?,
                value: reader.u64()?,
            },
            3 => Act::Bar {
                offset: reader.u16()?,
                width: reader.u8()?,
                value: reader.u64()?,
            },
            4 => Act::Pci {
                offset: reader.u8()?,
                width: reader.u8()?,
                value: reader.u32()?,
            },
            5 => Act::chain(reader)?,
            6 => Act::Descriptor {
                queue: reader.u8()?,
                slot: reader.u8()?,
                address: reader.address()?,
                length: reader.u32()?,
                flags: reader.u16()?,
                next: reader.u16()?,
            },
            7 => Act::Poke {
                address: reader.address()?,
                bytes: reader.short()?,
            },
            8 => Act::Publish {
                queue: reader.u8()?,
                head: reader.u16()?,
            },
            9 => Act::Index {
                queue: reader.u8()?,
                index: reader.u16()?,
            },
            10 => Act::Events {
                queue: reader.u8()?,
                flags: reader.u16()?,
                event: reader.u16()?,
            },
            11 => Act::Kick(reader.u8()?),
            12 => Act::Turn,
            13 => Act::Settle,
            14 => Act::Reset,
            15 => Act::Own {
                kind: reader.u8()?,
                bytes: reader.short()?,
            },
            _ => Act::Pause,
        })
    }

    fn chain(reader: &mut Reader<'_>) -> Option<Act> {
        let (queue, shape) = (reader.u8()?, reader.u8()?);
        let readable = reader.long()?;
        let count = reader.u8()?;
        let writable = (0..count).map_while(|_| reader.u16()).collect();
        Some(Act::Chain {
            queue,
            shape,
            readable,
            writable,
        })
    }
}

/// Writes what [`Reader`] reads: how seeds are made.
#[cfg(test)]
impl Act {
    pub(crate) fn write(&self, to: &mut Vec<u8>) {
        let (kind, fields) = self.registers().unwrap_or_else(|| self.others());
        to.push(kind);
        to.extend(fields);
    }

    /// Its kind and its fields, if it is about registers alone.
    fn registers(&self) -> Option<(u8, Vec<u8>)> {
        Some(match self {
            Act::Up {
                features,
                queues,
                size_log,
            } => {
                let (features, queues) = (features.to_le_bytes(), queues.to_le_bytes());
                (0, [&features[..], &queues, &[*size_log]].concat())
            }
            Act::Status(status) => (1, vec![*status]),
            Act::Common {
                offset,
                width,
                value,
            } => (2, [&[*offset, *width][..], &value.to_le_bytes()].concat()),
            Act::Bar {
                offset,
                width,
                value,
            } => {
                let (offset, value) = (offset.to_le_bytes(), value.to_le_bytes());
                (3, [&offset[..], &[*width], &value].concat())
            }
            Act::Pci {
                offset,
                width,
                value,
            } => (4, [&[*offset, *width][..], &value.to_le_bytes()].concat()),
            Act::Reset => (14, Vec::new()),
            _ => return None,
        })
    }

    fn others(&self) -> (u8, Vec<u8>) {
        let two = |queue: &u8, value: &u16| [&[*queue][..], &value.to_le_bytes()].concat();
        let short = |bytes: &[u8]| [&[bytes.len() as u8][..], bytes].concat();
        match self {
            Act::Chain {
                queue,
                shape,
                readable,
                writable,
            } => {
                let length = (readable.len() as u16).to_le_bytes();
                let lengths = writable.iter().flat_map(|length| length.to_le_bytes());
                let mut fields = [&[*queue, *shape][..], &length, readable].concat();
                fields.push(writable.len() as u8);
                fields.extend(lengths);
                (5, fields)
            }
            Act::Descriptor {
                queue,
                slot,
                address,
                length,
                flags,
                next,
            } => {
                let (address, length) = (written_address(*address), length.to_le_bytes());
                let (flags, next) = (flags.to_le_bytes(), next.to_le_bytes());
                (
                    6,
                    [&[*queue, *slot][..], &address, &length, &flags, &next].concat(),
                )
            }
            Act::Poke { address, bytes } => (7, [written_address(*address), short(bytes)].concat()),
            Act::Publish { queue, head } => (8, two(queue, head)),
            Act::Index { queue, index } => (9, two(queue, index)),
            Act::Events {
                queue,
                flags,
                event,
            } => (
                10,
                [two(queue, flags), event.to_le_bytes().to_vec()].concat(),
            ),
            Act::Kick(queue) => (11, vec![*queue]),
            Act::Turn => (12, Vec::new()),
            Act::Own { kind, bytes } => (15, [vec![*kind], short(bytes)].concat()),
            Act::Pause => (16, Vec::new()),
            Act::Settle => (13, Vec::new()),
            _ => unreachable!("it is about registers alone"),
        }
    }
}

#[cfg(test)]
fn written_address(address: u64) -> Vec<u8> {
    match u16::try_from(address) {
        Ok(address) => [&[0][..], &address.to_le_bytes()].concat(),
        Err(_) => [&[WIDE][..], &address.to_le_bytes()].concat(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_step_reads_as_it_was_written() {
        for kind in 0..KINDS {
            for filling in [0, 0x11, 0xff] {
                let mut bytes = vec![filling; 70_000];
                bytes[0] = kind;
                let act = Act::read(&mut Reader::new(&bytes)).expect("a step");
                let mut written = Vec::new();
                act.write(&mut written);
                assert_eq!(written[0], kind);
                let again = Act::read(&mut Reader::new(&written));
                assert_eq!(again, Some(act));
            }
        }
    }
}
