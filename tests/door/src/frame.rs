//! What crosses the testbed's door: frames over one byte stream, in both directions. The outside (`cargo xtask testbed`)
//! and the inside (`testbed-door`) are built from this one file; it does no I/O.
//!
//! A frame is a kind (one byte), the length of its payload (four bytes, little endian) and the payload. The bytes of a
//! stream flow only against credit: at most `WINDOW_BYTES` are under way, so neither end ever has to stop reading frames,
//! and a signal gets through however full the streams are. Lengths are checked before anything is kept.

/// The payload of one frame.
pub(crate) const FRAME_MAX_BYTES: usize = 1 << 20;
/// The bytes that one data frame carries.
pub(crate) const DATA_MAX_BYTES: usize = 32 << 10;
/// What may be under way on one stream before the receiver has said that it passed bytes on.
pub(crate) const WINDOW_BYTES: u32 = 256 << 10;
/// Kind and length.
pub(crate) const HEADER_BYTES: usize = 5;

/// Why bytes are not a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum FrameError {
    /// The length is over the bound.
    #[error("a frame of {0} bytes is longer than {FRAME_MAX_BYTES}")]
    TooLong(usize),
    /// Nobody sends this kind.
    #[error("no frame is of kind {0}")]
    Kind(u8),
    /// The payload ends early, goes on too long, or holds a value that cannot be.
    #[error("the payload of a frame of kind {0} is malformed")]
    Payload(u8),
}

/// Which of a command's streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Stream {
    /// Into the command. On a terminal also what is typed.
    In,
    /// Out of the command. On a terminal everything that it prints.
    Out,
    /// Errors of the command; unused on a terminal.
    Err,
}

/// A terminal's size in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Size {
    /// Lines.
    pub(crate) rows: u16,
    /// Characters a line.
    pub(crate) columns: u16,
}

/// A command to run inside, as root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Run {
    /// The time outside in nanoseconds since 1970: the saved machine's clock stands still.
    pub(crate) clock_ns: u64,
    /// On a terminal of this size; else on three pipes.
    pub(crate) terminal: Option<Size>,
    /// Program and arguments.
    pub(crate) words: Vec<Vec<u8>>,
    /// `NAME=value` each, added to the door's own.
    pub(crate) variables: Vec<Vec<u8>>,
    /// Copied before the command starts: from, below the programs' drive; to, absolute.
    pub(crate) copies: Vec<(Vec<u8>, Vec<u8>)>,
}

/// One frame, of either direction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Frame {
    /// Inside to outside: the machine is up and the door listens.
    Ready,
    /// Outside to inside, once.
    Run(Run),
    /// Bytes of a stream.
    Data(Stream, Vec<u8>),
    /// The stream ended (sent by its source), or nobody reads it any more (sent by its sink).
    Closed(Stream),
    /// The sink passed this many bytes on.
    Credit(Stream, u32),
    /// Outside to inside: send this signal to the command.
    Signal(u8),
    /// Outside to inside: the terminal has this size now.
    Resize(Size),
    /// Inside to outside, last: the command's exit code, 128+n for signal n.
    Exit(u8),
    /// Inside to outside, last: the command could not be run; the exit code to take and why.
    Refused(u8, String),
}

const READY: u8 = 1;
const RUN: u8 = 2;
const DATA: u8 = 3;
const CLOSED: u8 = 4;
const CREDIT: u8 = 5;
const SIGNAL: u8 = 6;
const RESIZE: u8 = 7;
const EXIT: u8 = 8;
const REFUSED: u8 = 9;

impl Frame {
    /// The frame as bytes.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = vec![0; HEADER_BYTES];
        let kind = match self {
            Self::Ready => READY,
            Self::Run(run) => {
                put_run(&mut out, run);
                RUN
            }
            Self::Data(stream, bytes) => {
                out.push(stream.number());
                out.extend_from_slice(bytes);
                DATA
            }
            Self::Closed(stream) => {
                out.push(stream.number());
                CLOSED
            }
            Self::Credit(stream, bytes) => {
                out.push(stream.number());
                out.extend_from_slice(&bytes.to_le_bytes());
                CREDIT
            }
            Self::Signal(number) => {
                out.push(*number);
                SIGNAL
            }
            Self::Resize(size) => {
                put_size(&mut out, *size);
                RESIZE
            }
            Self::Exit(code) => {
                out.push(*code);
                EXIT
            }
            Self::Refused(code, why) => {
                out.push(*code);
                out.extend_from_slice(why.as_bytes());
                REFUSED
            }
        };
        let length = u32::try_from(out.len() - HEADER_BYTES)
            .unwrap_or(u32::MAX)
            .to_le_bytes();
        let header = std::iter::once(kind).chain(length);
        out.iter_mut()
            .zip(header)
            .for_each(|(place, byte)| *place = byte);
        out
    }

    fn decode(kind: u8, payload: &[u8]) -> Result<Self, FrameError> {
        let mut rest = Payload(payload);
        let frame = match kind {
            READY => Some(Self::Ready),
            RUN => rest.run().map(Self::Run),
            DATA => rest
                .stream()
                .map(|stream| Self::Data(stream, rest.all().to_vec())),
            CLOSED => rest.stream().map(Self::Closed),
            CREDIT => rest
                .stream()
                .and_then(|stream| rest.u32().map(|bytes| Self::Credit(stream, bytes))),
            SIGNAL => rest.u8().map(Self::Signal),
            RESIZE => rest.size().map(Self::Resize),
            EXIT => rest.u8().map(Self::Exit),
            REFUSED => rest
                .u8()
                .map(|code| Self::Refused(code, String::from_utf8_lossy(rest.all()).into_owned())),
            _ => return Err(FrameError::Kind(kind)),
        };
        frame
            .filter(|_| rest.0.is_empty())
            .ok_or(FrameError::Payload(kind))
    }
}

/// Turns the bytes as they arrive into frames.
#[derive(Debug, Default)]
pub(crate) struct Decoder {
    bytes: Vec<u8>,
}

impl Decoder {
    /// Adds bytes that arrived.
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// The next whole frame, if there is one.
    ///
    /// # Errors
    /// The bytes are no frame; the stream is of no use from here on.
    pub(crate) fn next_frame(&mut self) -> Result<Option<Frame>, FrameError> {
        let Some((header, rest)) = self.bytes.split_first_chunk::<HEADER_BYTES>() else {
            return Ok(None);
        };
        let [kind, length @ ..] = *header;
        let length = usize::try_from(u32::from_le_bytes(length)).unwrap_or(usize::MAX);
        if length > FRAME_MAX_BYTES {
            return Err(FrameError::TooLong(length));
        }
        let Some(payload) = rest.get(..length) else {
            return Ok(None);
        };
        let frame = Frame::decode(kind, payload)?;
        self.bytes.drain(..HEADER_BYTES + length);
        Ok(Some(frame))
    }
}

impl Stream {
    fn number(self) -> u8 {
        match self {
            Self::In => 0,
            Self::Out => 1,
            Self::Err => 2,
        }
    }
}

fn put_run(out: &mut Vec<u8>, run: &Run) {
    out.extend_from_slice(&run.clock_ns.to_le_bytes());
    match run.terminal {
        None => out.push(0),
        Some(size) => {
            out.push(1);
            put_size(out, size);
        }
    }
    put_list(out, run.words.iter());
    put_list(out, run.variables.iter());
    put_list(out, run.copies.iter().flat_map(|(from, to)| [from, to]));
}

fn put_size(out: &mut Vec<u8>, size: Size) {
    out.extend_from_slice(&size.rows.to_le_bytes());
    out.extend_from_slice(&size.columns.to_le_bytes());
}

fn put_list<'a>(out: &mut Vec<u8>, list: impl Iterator<Item = &'a Vec<u8>> + Clone) {
    let length = |n: usize| u32::try_from(n).unwrap_or(u32::MAX).to_le_bytes();
    out.extend_from_slice(&length(list.clone().count()));
    for item in list {
        out.extend_from_slice(&length(item.len()));
        out.extend_from_slice(item);
    }
}

/// What is left of a payload.
struct Payload<'a>(&'a [u8]);

impl<'a> Payload<'a> {
    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(taken)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.take(N)?.try_into().ok()
    }

    fn all(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }

    fn u8(&mut self) -> Option<u8> {
        self.array().map(|[byte]| byte)
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn stream(&mut self) -> Option<Stream> {
        match self.u8()? {
            0 => Some(Stream::In),
            1 => Some(Stream::Out),
            2 => Some(Stream::Err),
            _ => None,
        }
    }

    fn size(&mut self) -> Option<Size> {
        let rows = self.array().map(u16::from_le_bytes)?;
        let columns = self.array().map(u16::from_le_bytes)?;
        Some(Size { rows, columns })
    }

    fn list(&mut self) -> Option<Vec<Vec<u8>>> {
        let count = self.u32()?;
        let mut items = Vec::new();
        for _ in 0..count {
            // Each item takes at least its length from the payload, so a huge count runs out of it at once.
            let length = usize::try_from(self.u32()?).ok()?;
            items.push(self.take(length)?.to_vec());
        }
        Some(items)
    }

    fn run(&mut self) -> Option<Run> {
        let clock_ns = self.array().map(u64::from_le_bytes)?;
        let terminal = match self.u8()? {
            0 => None,
            1 => Some(self.size()?),
            _ => return None,
        };
        let words = self.list()?;
        let variables = self.list()?;
        let mut copies = Vec::new();
        let mut paths = self.list()?.into_iter();
        while let Some(from) = paths.next() {
            copies.push((from, paths.next()?));
        }
        Some(Run {
            clock_ns,
            terminal,
            words,
            variables,
            copies,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn through(frame: &Frame) -> Frame {
        let mut decoder = Decoder::default();
        decoder.push(&frame.encode());
        let decoded = decoder.next_frame().expect("well formed").expect("whole");
        assert_eq!(decoder.next_frame(), Ok(None));
        decoded
    }

    #[test]
    fn every_kind_of_frame_survives_the_way() {
        let size = Size {
            rows: 25,
            columns: 80,
        };
        let run = Run {
            clock_ns: 1 << 60,
            terminal: Some(size),
            words: vec![b"sh".to_vec(), Vec::new(), b"\xff\0".to_vec()],
            variables: vec![b"A=b".to_vec()],
            copies: vec![(b"0".to_vec(), b"/x".to_vec())],
        };
        for frame in [
            Frame::Ready,
            Frame::Run(run.clone()),
            Frame::Run(Run {
                terminal: None,
                ..run
            }),
            Frame::Data(Stream::Err, vec![0; DATA_MAX_BYTES]),
            Frame::Closed(Stream::In),
            Frame::Credit(Stream::Out, WINDOW_BYTES),
            Frame::Signal(15),
            Frame::Resize(size),
            Frame::Exit(255),
            Frame::Refused(127, "no such file".to_owned()),
        ] {
            assert_eq!(through(&frame), frame);
        }
    }

    #[test]
    fn half_a_frame_waits_for_the_rest() {
        let bytes = Frame::Exit(7).encode();
        let mut decoder = Decoder::default();
        for byte in bytes.iter().take(bytes.len() - 1) {
            decoder.push(&[*byte]);
            assert_eq!(decoder.next_frame(), Ok(None));
        }
        decoder.push(&[7]);
        assert_eq!(decoder.next_frame(), Ok(Some(Frame::Exit(7))));
    }

    #[test]
    fn a_length_over_the_bound_is_refused_before_its_bytes_come() {
        let mut decoder = Decoder::default();
        decoder.push(&[DATA, 0xff, 0xff, 0xff, 0xff]);
        assert_eq!(decoder.next_frame(), Err(FrameError::TooLong(0xffff_ffff)));
    }

    #[test]
    fn trailing_bytes_are_malformed() {
        let mut decoder = Decoder::default();
        decoder.push(&[EXIT, 2, 0, 0, 0, 7, 7]);
        assert_eq!(decoder.next_frame(), Err(FrameError::Payload(EXIT)));
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_decoder_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut decoder = Decoder::default();
            decoder.push(&bytes);
            while let Ok(Some(_)) = decoder.next_frame() {}
        }

        #[test]
        fn malformed_runs_are_refused_or_stable(payload in proptest::collection::vec(any::<u8>(), 0..120)) {
            if let Ok(frame) = Frame::decode(RUN, &payload) {
                prop_assert_eq!(through(&frame), frame);
            }
        }
    }
}
