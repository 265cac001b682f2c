//! A shared directory (virtio 1.2 section 5.11), in whose root is a file `honest`, a fifo `fifo` and a link `outside` that leads
//! out of it.

mod chapters;
mod request;

use super::{COMMON_COUNT, Honest, Named, chapters_of, queues};
use crate::cpu::{peek, poke};
use crate::report::{Outcome, same};
use crate::ring::{Descriptor, Ring, readable, writable};
use crate::virtio::Device;
use request::{
    Arguments, EPROTO, FORGET, GETATTR, Header, IN_HEADER, INIT, LOOKUP, OK, OPEN, OUT_HEADER,
    READ, RELEASE, ROOT, WRITE,
};

const TYPE: u16 = 26;
/// Queues: what is never answered, and requests.
const FORGETS: usize = 0;
const REQUESTS: usize = 1;
/// A request, its data, and its answer.
const REQUEST: u64 = 0x60_0000;
const DATA: u64 = 0x62_0000;
const REPLY: u64 = 0x80_0000;
/// Room for every answer of fixed size.
const ROOM: u32 = 0x1000;
/// What is written where an answer is to come.
const NOTHING: u64 = 0x5555_aaaa_5555_aaaa;
const FILE: &[u8] = b"honest";

pub(crate) struct Fs {
    device: Device,
    rings: [Ring; 2],
    victim: usize,
    unique: u64,
    /// What the last honest question wrote.
    wrote: u64,
}

pub(super) const CHAPTERS: [Named<Fs>; COMMON_COUNT + 9] = chapters_of!(
    Fs,
    &[
        ("no chain of forgets", chapters::forgets),
        ("requests that are none", chapters::requests),
        ("requests out of time", chapters::time),
        ("names that are none", chapters::names),
        ("nodes and handles that are not there", chapters::nodes),
        ("links and special files", chapters::special),
        ("sizes and offsets beyond all files", chapters::sizes),
        ("opens without end", chapters::opens),
        ("resets with requests in flight", chapters::resets),
    ]
);

impl Fs {
    pub(super) fn new() -> Outcome<Fs> {
        Ok(Fs {
            device: Device::find(TYPE)?,
            rings: queues(),
            victim: REQUESTS,
            unique: 0,
            wrote: 0,
        })
    }

    /// Writes a request's header and arguments; its bytes.
    fn put(&mut self, operation: u32, node: u64, arguments: &Arguments) -> u32 {
        self.unique += 1;
        let length = IN_HEADER + arguments.length();
        let header = Header {
            length,
            operation,
            unique: self.unique,
            node,
            extensions: 0,
        };
        header.put(REQUEST);
        arguments.put(REQUEST + u64::from(IN_HEADER));
        length
    }

    /// Sends a chain; the bytes of its answer.
    fn send(&mut self, queue: usize, chain: &[Descriptor]) -> Outcome<u32> {
        poke(REPLY, NOTHING);
        poke(REPLY + 8, NOTHING);
        let ring = &mut self.rings[queue];
        ring.chain(0, chain);
        ring.offer(0);
        self.device.kick(queue as u16);
        let (head, bytes) = self.device.answer(&mut self.rings[queue])?;
        same("the head of an answer", head, 0u32)?;
        Ok(bytes)
    }

    /// Sends what was put, which is answered; the error.
    fn reply(&mut self, chain: &[Descriptor]) -> Outcome<i32> {
        let bytes = self.send(REQUESTS, chain)?;
        same("bytes written", bytes, peek::<u32>(REPLY))?;
        same("whose answer", peek::<u64>(REPLY + 8), self.unique)?;
        Ok(peek::<u32>(REPLY + 4).wrapping_neg() as i32)
    }

    /// A request with room for its answer.
    fn call(&mut self, operation: u32, node: u64, arguments: &Arguments) -> Outcome<i32> {
        let length = self.put(operation, node, arguments);
        self.reply(&[readable(REQUEST, length), writable(REPLY, ROOM)])
    }

    /// One that has to be well.
    fn well(&mut self, operation: u32, node: u64, arguments: &Arguments) -> Outcome {
        let error = self.call(operation, node, arguments)?;
        wanted(error, OK)
    }

    /// WRITE with as much data as it says, or not.
    fn write(&mut self, node: u64, arguments: &Arguments, bytes: u32) -> Outcome<i32> {
        let length = self.put(WRITE, node, arguments) + bytes;
        poke(REQUEST, length);
        self.reply(&[
            readable(REQUEST, IN_HEADER + arguments.length()),
            readable(DATA, bytes),
            writable(REPLY, ROOM),
        ])
    }

    /// A session, if there is none.
    fn begin(&mut self) -> Outcome {
        let error = self.call(GETATTR, ROOT, &Arguments::of(&[0, 0]))?;
        match error {
            EPROTO => self.well(INIT, 0, &Arguments::init(7, 38, 0)),
            _ => wanted(error, OK),
        }
    }

    /// The node of a name in the root.
    fn lookup(&mut self, name: &[u8]) -> Outcome<u64> {
        self.well(LOOKUP, ROOT, &Arguments::named(name))?;
        Ok(peek(REPLY + u64::from(OUT_HEADER)))
    }

    /// A handle of a file, to read and write it.
    fn open(&mut self, node: u64) -> Outcome<u64> {
        const READ_AND_WRITE: u64 = 2;
        self.well(OPEN, node, &Arguments::of(&[READ_AND_WRITE]))?;
        Ok(peek(REPLY + u64::from(OUT_HEADER)))
    }

    /// Gives back lookups of a node; of that nobody is told.
    fn forget(&mut self, node: u64, lookups: u64) -> Outcome {
        let length = self.put(FORGET, node, &Arguments::of(&[lookups]));
        let bytes = self.send(FORGETS, &[readable(REQUEST, length)])?;
        same("bytes written", bytes, 0u32)
    }
}

/// Compares what a request was answered.
fn wanted(error: i32, wanted: i32) -> Outcome {
    same("the error", error as u32, wanted as u32)
}

impl Honest for Fs {
    fn device(&self) -> Device {
        self.device
    }

    fn rings(&mut self) -> &mut [Ring] {
        &mut self.rings
    }

    fn victim(&mut self) -> &mut Ring {
        &mut self.rings[self.victim]
    }

    /// What was written to the file is read from it.
    fn ask(&mut self) -> Outcome {
        self.begin()?;
        let node = self.lookup(FILE)?;
        let handle = self.open(node)?;
        self.wrote += 0x0123_4567_89ab;
        poke(DATA, self.wrote);
        let io = Arguments::io(handle, 8, 8);
        let error = self.write(node, &io, 8)?;
        wanted(error, OK)?;
        self.well(READ, node, &io)?;
        let read = peek::<u64>(REPLY + u64::from(OUT_HEADER));
        same("bytes of the file", read, self.wrote)?;
        self.well(RELEASE, node, &Arguments::of(&[handle, 0, 0]))?;
        self.forget(node, 1)
    }
}
