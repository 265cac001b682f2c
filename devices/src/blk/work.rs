//! One request on its way through the host: which call comes next, and what its result means.
//!
//! Pure. A transfer goes on after a short count, zeroes are written where a file system has no call for them, and ranges are
//! done one after the other; so one request is one or many calls, but never two at once.

use super::request::{Extent, Status};
use rustix::io::Errno;

/// Most bytes of zeroes that one call writes.
pub(super) const ZEROES_MAX_BYTES: u64 = 1 << 20;
/// So often in a row a call may say that it should be made again.
const RETRIES_MAX: u8 = 16;

/// One system call's worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Call {
    /// `preadv(2)` into what is left of the buffers.
    Read {
        /// Where in the file.
        offset: u64,
    },
    /// `pwritev2(2)` of what is left of the buffers.
    Write {
        /// Where in the file.
        offset: u64,
        /// With RWF_DSYNC.
        durable: bool,
    },
    /// `pwritev2(2)` of zeroes, at most [`ZEROES_MAX_BYTES`].
    Zeroes(Extent),
    /// `fallocate(2)`, FALLOC_FL_PUNCH_HOLE: the bytes read as zero from now on and take no room.
    Punch(Extent),
    /// `fallocate(2)`, FALLOC_FL_ZERO_RANGE: the bytes read as zero and keep their room.
    ZeroRange(Extent),
    /// `fdatasync(2)`.
    Sync,
}

/// How a range is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    /// A wish: a file system that cannot grant it does nothing.
    Discard,
    /// As zeroes, whose room may be given up or not.
    Zero { unmap: bool },
    /// As zeroes that are written.
    Written,
}

#[derive(Clone, Debug)]
enum Kind {
    /// What is left to read or to write.
    Read(Extent),
    Write(Extent),
    /// What is left to do, the last one first.
    Ranges(Vec<(Extent, How)>),
    Sync,
}

/// A request's way.
#[derive(Clone, Debug)]
pub(super) struct Work {
    kind: Kind,
    /// Every change is to be durable before it is answered.
    durable: bool,
    retries: u8,
}

impl Work {
    fn new(kind: Kind, durable: bool) -> Work {
        Work {
            kind,
            durable,
            retries: 0,
        }
    }

    /// Reads all of `extent`, which is not empty.
    pub(super) fn read(extent: Extent) -> Work {
        Work::new(Kind::Read(extent), false)
    }

    /// Writes all of `extent`, which is not empty; `durable` if the driver will send no FLUSH (section 5.2.6.2).
    pub(super) fn write(extent: Extent, durable: bool) -> Work {
        Work::new(Kind::Write(extent), durable)
    }

    /// Makes durable what was written.
    pub(super) fn flush() -> Work {
        Work::new(Kind::Sync, false)
    }

    /// Gives up `ranges`; `None` if all are empty.
    pub(super) fn discard(ranges: &[Extent]) -> Option<Work> {
        let ranges = ranges.iter().map(|extent| (*extent, How::Discard));
        Work::ranges(ranges, false)
    }

    /// Makes `ranges` zero; `None` if all are empty.
    pub(super) fn write_zeroes(ranges: &[(Extent, bool)], durable: bool) -> Option<Work> {
        let how = |(extent, unmap): &(Extent, bool)| (*extent, How::Zero { unmap: *unmap });
        Work::ranges(ranges.iter().map(how), durable)
    }

    fn ranges(
        ranges: impl DoubleEndedIterator<Item = (Extent, How)>,
        durable: bool,
    ) -> Option<Work> {
        let ranges: Vec<_> = ranges.rev().filter(|(range, _)| range.length > 0).collect();
        (!ranges.is_empty()).then(|| Work::new(Kind::Ranges(ranges), durable))
    }

    /// Whether it fills the driver's buffers.
    pub(super) fn is_read(&self) -> bool {
        matches!(self.kind, Kind::Read(_))
    }

    /// The call to make now.
    pub(super) fn call(&self) -> Call {
        match &self.kind {
            Kind::Read(left) => Call::Read {
                offset: left.offset,
            },
            Kind::Write(left) => Call::Write {
                offset: left.offset,
                durable: self.durable,
            },
            Kind::Sync => Call::Sync,
            Kind::Ranges(ranges) => match ranges.last() {
                Some((extent, How::Discard | How::Zero { unmap: true })) => Call::Punch(*extent),
                Some((extent, How::Zero { unmap: false })) => Call::ZeroRange(*extent),
                Some((extent, How::Written)) => Call::Zeroes(Extent {
                    length: extent.length.min(ZEROES_MAX_BYTES),
                    ..*extent
                }),
                None => Call::Sync,
            },
        }
    }

    /// Takes the result of the call, in bytes where it moves bytes. `None`: there is another call to make.
    pub(super) fn completed(&mut self, result: Result<u64, Errno>) -> Option<Status> {
        let moved = match result {
            Err(Errno::INTR | Errno::AGAIN) if self.retries < RETRIES_MAX => {
                self.retries += 1;
                return None;
            }
            Err(Errno::OPNOTSUPP) => return self.unsupported(),
            Err(_) => return Some(Status::IoError),
            Ok(moved) => moved,
        };
        self.retries = 0;
        match &mut self.kind {
            Kind::Sync => Some(Status::Ok),
            Kind::Read(left) | Kind::Write(left) => {
                if moved == 0 {
                    // The file ends before the disk does: it was cut off meanwhile.
                    return Some(Status::IoError);
                }
                left.advance(moved);
                (left.length == 0).then_some(Status::Ok)
            }
            Kind::Ranges(ranges) => {
                match ranges.last_mut() {
                    Some((_, How::Written)) if moved == 0 => return Some(Status::IoError),
                    Some((left, How::Written)) => left.advance(moved),
                    Some((left, _)) => left.length = 0,
                    None => return Some(Status::Ok),
                }
                self.next_range()
            }
        }
    }

    /// The file system has no such call.
    fn unsupported(&mut self) -> Option<Status> {
        let Kind::Ranges(ranges) = &mut self.kind else {
            return Some(Status::IoError);
        };
        match ranges.last_mut() {
            Some((left, How::Discard)) => left.length = 0,
            Some((_, how @ How::Zero { .. })) => *how = How::Written,
            _ => return Some(Status::IoError),
        }
        self.next_range()
    }

    fn next_range(&mut self) -> Option<Status> {
        let Kind::Ranges(ranges) = &mut self.kind else {
            return Some(Status::Ok);
        };
        if ranges.last().is_some_and(|(range, _)| range.length == 0) {
            ranges.pop();
        }
        match (ranges.is_empty(), self.durable) {
            (false, _) => None,
            (true, false) => Some(Status::Ok),
            (true, true) => {
                self.kind = Kind::Sync;
                None
            }
        }
    }
}

impl Extent {
    fn advance(&mut self, moved: u64) {
        let moved = moved.min(self.length);
        self.offset += moved;
        self.length -= moved;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn extent(offset: u64, length: u64) -> Extent {
        Extent { offset, length }
    }

    #[test]
    fn a_short_transfer_goes_on_where_it_stopped() {
        let mut work = Work::write(extent(1024, 1536), true);
        let write = |offset| Call::Write {
            offset,
            durable: true,
        };
        assert_eq!(work.call(), write(1024));
        assert_eq!(work.completed(Ok(1000)), None);
        assert_eq!(work.call(), write(2024));
        assert_eq!(work.completed(Ok(536)), Some(Status::Ok));
    }

    #[test]
    fn a_file_that_ends_early_is_an_error() {
        let mut work = Work::read(extent(0, 1024));
        assert_eq!(work.completed(Ok(512)), None);
        assert_eq!(work.call(), Call::Read { offset: 512 });
        assert_eq!(work.completed(Ok(0)), Some(Status::IoError));
    }

    #[test]
    fn a_call_is_made_again_only_so_often() {
        let mut work = Work::flush();
        for _ in 0..RETRIES_MAX {
            assert_eq!(work.completed(Err(Errno::AGAIN)), None);
            assert_eq!(work.call(), Call::Sync);
        }
        assert_eq!(work.completed(Err(Errno::AGAIN)), Some(Status::IoError));
    }

    #[test]
    fn a_host_s_error_is_an_error() {
        for errno in [Errno::IO, Errno::NOSPC, Errno::DQUOT, Errno::FBIG] {
            let mut works = vec![Work::read(extent(0, 512)), Work::flush()];
            works.extend(Work::discard(&[extent(0, 512), extent(512, 512)]));
            for mut work in works {
                assert_eq!(work.completed(Err(errno)), Some(Status::IoError));
            }
        }
    }

    #[test]
    fn ranges_are_done_in_order_and_empty_ones_not_at_all() {
        let ranges = [extent(0, 512), extent(9, 0), extent(4096, 1024)];
        let mut work = Work::discard(&ranges).expect("something to do");
        assert_eq!(work.call(), Call::Punch(ranges[0]));
        assert_eq!(work.completed(Ok(0)), None);
        assert_eq!(work.call(), Call::Punch(ranges[2]));
        assert_eq!(work.completed(Ok(0)), Some(Status::Ok));
        assert!(Work::discard(&[extent(7, 0)]).is_none());
    }

    #[test]
    fn what_cannot_be_discarded_is_left_alone() {
        let mut work = Work::discard(&[extent(0, 512)]).expect("something to do");
        assert_eq!(work.completed(Err(Errno::OPNOTSUPP)), Some(Status::Ok));
    }

    #[test]
    fn zeroes_are_written_where_there_is_no_call_for_them() {
        let ranges = [(extent(512, 2 * MIB + 512), false), (extent(0, 512), true)];
        let mut work = Work::write_zeroes(&ranges, true).expect("something to do");
        assert_eq!(work.call(), Call::ZeroRange(ranges[0].0));
        assert_eq!(work.completed(Err(Errno::OPNOTSUPP)), None);
        assert_eq!(work.call(), Call::Zeroes(extent(512, MIB)));
        assert_eq!(work.completed(Ok(MIB)), None);
        assert_eq!(work.call(), Call::Zeroes(extent(512 + MIB, MIB)));
        assert_eq!(work.completed(Ok(MIB - 512)), None);
        assert_eq!(work.call(), Call::Zeroes(extent(2 * MIB, 1024)));
        assert_eq!(work.completed(Ok(1024)), None);
        // The next range is tried anew, and all is made durable in the end.
        assert_eq!(work.call(), Call::Punch(ranges[1].0));
        assert_eq!(work.completed(Ok(0)), None);
        assert_eq!(work.call(), Call::Sync);
        assert_eq!(work.completed(Ok(0)), Some(Status::Ok));
    }

    #[test]
    fn a_disk_that_takes_no_zeroes_is_an_error() {
        let mut work = Work::write_zeroes(&[(extent(0, 512), true)], false).expect("something");
        assert_eq!(work.completed(Err(Errno::OPNOTSUPP)), None);
        assert_eq!(work.completed(Ok(0)), Some(Status::IoError));
    }
}
