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
    let files = Mutex::new(files_below(directory)?);
    // Held while one directory is listed, so that its files are read next, while the guest still knows their names.
    let next = || files.lock().ok()?.next();
    let reader = || -> io::Result<usize> {
        let mut good = 0;
        while let Some(file) = next() {
            good += usize::from(holds(&file?, content)?);
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

/// The files of each directory in `directory`, one directory listed after the other.
fn files_below(directory: &Path) -> io::Result<impl Iterator<Item = io::Result<PathBuf>>> {
    let directories = paths(directory)?;
    Ok(directories.flat_map(|directory| {
        let (listed, error) = match directory.and_then(paths) {
            Ok(listed) => (Some(listed), None),
            Err(error) => (None, Some(Err(error))),
        };
        listed.into_iter().flatten().chain(error)
    }))
}

fn paths(directory: impl AsRef<Path>) -> io::Result<impl Iterator<Item = io::Result<PathBuf>>> {
    let entries = fs::read_dir(directory)?;
    Ok(entries.map(|entry| Ok(entry?.path())))
}

/// Whether a file holds `content` and nothing else.
fn holds(file: &Path, content: &[u8]) -> io::Result<bool> {
    let mut bytes = [0; CONTENT_MAX_BYTES];
    let length = File::open(file)?.read(&mut bytes)?;
    Ok(bytes.get(..length) == Some(content))
}
