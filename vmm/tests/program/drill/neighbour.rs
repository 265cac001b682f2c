//! Another VM of the same host, which the drill is to leave in peace.

use crate::harness::{Code, Running, Vmm};
use std::ffi::CString;
use std::fs::{read_dir, read_to_string};
use std::path::PathBuf;

/// Another VM, and a directory as an owner may keep one for each. Goes when dropped.
pub(super) struct Neighbour {
    running: Running,
    directory: PathBuf,
    /// The directory's name, and that of a file in it.
    pub names: [CString; 2],
    /// Its number on the host.
    pub pid: i64,
    mounts: String,
    host_name: String,
}

const IN_THE_DIRECTORY: &str = "config.json";

impl Neighbour {
    pub(super) fn start() -> Neighbour {
        let mut running = Vmm::of(&Code::default().print("up").halt()).start();
        running.printed("up");
        let pid = running.child.id();
        let directory = std::env::temp_dir().join(format!("capsid-drill-{pid}"));
        std::fs::create_dir(&directory).unwrap();
        let file = directory.join(IN_THE_DIRECTORY);
        std::fs::write(&file, "its own").unwrap();
        let name = |path: &PathBuf| CString::new(path.to_str().unwrap()).unwrap();
        Neighbour {
            running,
            names: [name(&directory), name(&file)],
            directory,
            pid: i64::from(pid),
            mounts: mounts(),
            host_name: host_name(),
        }
    }

    /// It runs, its directory is what it was, and so is the host.
    pub(super) fn is_unharmed(&mut self) {
        assert_eq!(self.running.child.try_wait().unwrap(), None);
        let entries = read_dir(&self.directory).unwrap();
        let entries: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(entries, [IN_THE_DIRECTORY]);
        let text = read_to_string(self.directory.join(IN_THE_DIRECTORY));
        assert_eq!(text.unwrap(), "its own");
        assert_eq!(mounts(), self.mounts);
        assert_eq!(host_name(), self.host_name);
    }
}

impl Drop for Neighbour {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

fn mounts() -> String {
    read_to_string("/proc/self/mountinfo").unwrap()
}

fn host_name() -> String {
    read_to_string("/proc/sys/kernel/hostname").unwrap()
}
