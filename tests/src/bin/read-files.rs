//! Reads all files in the directories below one, with many threads, and prints how many held what they should. It runs in the
//! guest: threads keep many requests of the share in flight, as a busy container does.
//!
//! `read-files DIRECTORY CONTENT`

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Mutex;
use std::thread;

/// So many requests are in flight at once.
const THREADS: usize = 16;
/// Longest content, in bytes; a file that has more does not hold what it should.
const CONTENT_MAX_BYTES: usize = 64;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [directory, content] = arguments.as_slice() else {
        eprintln!("read-files: needs DIRECTORY CONTENT");
        return ExitCode::FAILURE;
    };
    match read_all(Path::new(directory), content.as_bytes()) {
        Ok(count) => {
            println!("{count}");
            ExitCode::SUCCESS
        }
        Err(cause) => {
            eprintln!("read-files: {cause}");
            ExitCode::FAILURE
        }
    }
}

fn read_all(directory: &Path, content: &[u8]) -> io::Result<usize> {
    let directories: Vec<PathBuf> = fs::read_dir(directory)?
        .map(|entry| Ok(entry?.path()))
        .collect::<io::Result<_>>()?;
    let queue = Mutex::new(directories.into_iter());
    let next = || queue.lock().ok()?.next();
    let reader = || -> io::Result<usize> {
        let mut good = 0;
        while let Some(directory) = next() {
            good += read_directory(&directory, content)?;
        }
        Ok(good)
    };
    thread::scope(|scope| {
        let readers: Vec<_> = (0..THREADS).map(|_| scope.spawn(reader)).collect();
        readers
            .into_iter()
            .map(|reader| {
                reader
                    .join()
                    .unwrap_or_else(|_| Err(io::Error::other("a reader panicked")))
            })
            .sum()
    })
}

/// How many files of one directory hold `content`.
fn read_directory(directory: &Path, content: &[u8]) -> io::Result<usize> {
    let mut good = 0;
    for entry in fs::read_dir(directory)? {
        let mut bytes = [0; CONTENT_MAX_BYTES];
        let length = File::open(entry?.path())?.read(&mut bytes)?;
        good += usize::from(bytes.get(..length) == Some(content));
    }
    Ok(good)
}
