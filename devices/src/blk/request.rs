//! What a driver asks of a disk (virtio 1.2 section 5.2.6): one chain, parsed once and checked whole against the disk before
//! anything is done.
//!
//! Pure. The bytes are hostile: sector numbers up to 2^64, lengths that are no sectors, lists that are no lists, types that
//! nobody knows.

use crate::virtio::chain::Readable;

/// Bytes of a sector, the unit of every number that the driver sends (section 5.2.2).
pub(super) const SECTOR_BYTES: u64 = 512;
/// Most ranges of one DISCARD or WRITE_ZEROES; the configuration space says so.
pub(super) const RANGES_MAX: usize = 16;
/// Most sectors of one range to discard: 2 GiB.
pub(super) const DISCARD_SECTORS_MAX: u32 = 1 << 22;
/// Most sectors of one range to zero: 64 MiB, which a file system that cannot zero by itself has to be written.
pub(super) const WRITE_ZEROES_SECTORS_MAX: u32 = 1 << 17;
/// Bytes of the answer to GET_ID (section 5.2.6).
pub const ID_BYTES: usize = 20;

/// Types of requests (section 5.2.6). SCSI pass-through and the rest are nothing that we know.
mod kind {
    pub(super) const IN: u32 = 0;
    pub(super) const OUT: u32 = 1;
    pub(super) const FLUSH: u32 = 4;
    pub(super) const GET_ID: u32 = 8;
    pub(super) const DISCARD: u32 = 11;
    pub(super) const WRITE_ZEROES: u32 = 13;
}

/// Flag of a range to zero: the sectors may be given up.
const UNMAP: u32 = 1;

/// The last byte of a chain (section 5.2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    /// Done.
    Ok = 0,
    /// Refused, or the host failed.
    IoError = 1,
    /// Not a request of this disk.
    Unsupported = 2,
}

/// The first bytes of a chain, and each range of DISCARD and WRITE_ZEROES.
type Raw = [u8; RAW_BYTES];
const RAW_BYTES: usize = 16;

/// Type, reserved, sector (section 5.2.6).
fn header(raw: Raw) -> (u32, u64) {
    let [a, b, c, d, _, _, _, _, sector @ ..] = raw;
    (u32::from_le_bytes([a, b, c, d]), u64::from_le_bytes(sector))
}

/// First sector, how many, flags (section 5.2.6).
fn raw_range(raw: Raw) -> (u64, u32, u32) {
    let [s0, s1, s2, s3, s4, s5, s6, s7, c0, c1, c2, c3, flags @ ..] = raw;
    (
        u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]),
        u32::from_le_bytes([c0, c1, c2, c3]),
        u32::from_le_bytes(flags),
    )
}

/// Bytes of the disk, all of them inside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Extent {
    /// First byte.
    pub(super) offset: u64,
    /// How many; a multiple of [`SECTOR_BYTES`].
    pub(super) length: u64,
}

/// What a disk allows.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Its size in sectors.
    pub(super) sectors: u64,
    /// Nothing may change it.
    pub(super) read_only: bool,
    /// DISCARD was agreed on.
    pub(super) discard: bool,
    /// WRITE_ZEROES was agreed on.
    pub(super) write_zeroes: bool,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Request {
    /// Fill the driver's buffers from the disk.
    Read(Extent),
    /// Put the driver's bytes onto the disk.
    Write(Extent),
    /// Make durable what was written.
    Flush,
    /// Tell the disk's name.
    Identify,
    /// These bytes are needed no more.
    Discard(Vec<Extent>),
    /// These bytes are zero from now on; whether their room may be given up.
    WriteZeroes(Vec<(Extent, bool)>),
}

impl Limits {
    /// The bytes from `sector` on.
    fn extent(&self, sector: u64, bytes: u64) -> Result<Extent, Status> {
        let end = sector.checked_add(bytes / SECTOR_BYTES);
        let inside = end.is_some_and(|end| end <= self.sectors);
        if bytes % SECTOR_BYTES != 0 || !inside {
            return Err(Status::IoError);
        }
        Ok(Extent {
            // A disk has at most i64::MAX bytes, and `sector` is not beyond its end.
            offset: sector * SECTOR_BYTES,
            length: bytes,
        })
    }

    fn change(&self) -> Result<(), Status> {
        if self.read_only {
            Err(Status::IoError)
        } else {
            Ok(())
        }
    }
}

impl Request {
    /// Parses the readable part of a chain, of which the bytes to write are left; `room` is how many bytes the driver has
    /// for data, without the byte of the status.
    ///
    /// # Errors
    /// The status with which the request is refused; nothing has been done.
    pub(super) fn parse(
        readable: &mut Readable<'_>,
        room: usize,
        limits: Limits,
    ) -> Result<Request, Status> {
        let (kind, sector) = header(readable.read_struct().map_err(|_| Status::IoError)?);
        match kind {
            kind::IN => Ok(Request::Read(limits.extent(sector, room as u64)?)),
            kind::OUT => {
                limits.change()?;
                let bytes = readable.remaining() as u64;
                Ok(Request::Write(limits.extent(sector, bytes)?))
            }
            kind::FLUSH => Ok(Request::Flush),
            kind::GET_ID => Ok(Request::Identify),
            kind::DISCARD if limits.discard => {
                limits.change()?;
                // A range to discard has no flags; with them it is another request (section 5.2.6.2).
                let ranges = ranges(readable, limits, DISCARD_SECTORS_MAX, 0)?;
                Ok(Request::Discard(
                    ranges.into_iter().map(|(extent, _)| extent).collect(),
                ))
            }
            kind::WRITE_ZEROES if limits.write_zeroes => {
                limits.change()?;
                let ranges = ranges(readable, limits, WRITE_ZEROES_SECTORS_MAX, UNMAP)?;
                Ok(Request::WriteZeroes(ranges))
            }
            _ => Err(Status::Unsupported),
        }
    }
}

/// All ranges of a request; any bad one refuses all.
fn ranges(
    readable: &mut Readable<'_>,
    limits: Limits,
    sectors_max: u32,
    flags_known: u32,
) -> Result<Vec<(Extent, bool)>, Status> {
    let bytes = readable.remaining();
    let count = bytes / RAW_BYTES;
    if bytes % RAW_BYTES != 0 || !(1..=RANGES_MAX).contains(&count) {
        return Err(Status::IoError);
    }
    let range = |_| {
        let raw = readable.read_struct().map_err(|_| Status::IoError)?;
        let (sector, count, flags) = raw_range(raw);
        if flags & !flags_known != 0 {
            return Err(Status::Unsupported);
        }
        if count > sectors_max {
            return Err(Status::IoError);
        }
        let bytes = u64::from(count) * SECTOR_BYTES;
        let extent = limits.extent(sector, bytes)?;
        Ok((extent, flags & UNMAP != 0))
    };
    (0..count).map(range).collect()
}

#[cfg(test)]
#[path = "request_tests.rs"]
mod tests;

#[cfg(test)]
#[path = "request_proofs.rs"]
mod proofs;
