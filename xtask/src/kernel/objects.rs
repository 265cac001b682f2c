//! Objects of the kernel that are compiled behind a header of ours, where no symbol of the configuration says what a small guest needs.
//!
//! The source stays as it came; make takes the header by the variable that it has for the flags of one object. That the header did what it
//! is for is seen in the kernel's symbols, so that another version of the source cannot pass it by unnoticed.

use std::path::{Path, PathBuf};

/// Where the headers are in the checkout, each by the name of its object.
pub const OBJECTS: &str = "guest-kernel/objects";

/// One object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Object {
    name: &'static str,
    /// What no symbol of the kernel begins with then.
    gone: &'static str,
}

/// All of them.
const ALL: [Object; 2] = [
    Object {
        name: "alternative",
        gone: "patch_retpoline",
    },
    Object {
        name: "slub",
        gone: "__initcall__kmod_slub__",
    },
];

/// Why the headers were refused.
#[derive(Debug, thiserror::Error)]
pub enum ObjectError {
    /// A header could not be read.
    #[error("reading {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        cause: std::io::Error,
    },
    /// A header had no effect.
    #[error("{OBJECTS}/{name}.h does nothing to this source: there is still {symbol}")]
    NoEffect {
        /// The object.
        name: &'static str,
        /// What should be gone.
        symbol: String,
    },
}

/// The headers of a checkout.
#[derive(Clone, Debug)]
pub struct Headers {
    dir: PathBuf,
    texts: Vec<String>,
}

impl Headers {
    /// Reads the headers in `dir`.
    ///
    /// # Errors
    /// One of them is not there.
    pub fn read(dir: PathBuf) -> Result<Self, ObjectError> {
        let text = |object: &Object| {
            let path = header(&dir, object);
            std::fs::read_to_string(&path).map_err(|cause| ObjectError::Read { path, cause })
        };
        let texts = ALL.iter().map(text).collect::<Result<_, _>>()?;
        Ok(Self { dir, texts })
    }

    /// What they are, for the identity of a kernel.
    pub fn identity(&self) -> String {
        let named = ALL.iter().zip(&self.texts);
        named
            .map(|(object, text)| format!("{object:?}\n{text}"))
            .collect()
    }

    /// The words of make's command line that put each before its object.
    pub fn variables(&self) -> impl Iterator<Item = String> {
        ALL.iter().map(|object| {
            let path = header(&self.dir, object);
            format!("CFLAGS_{}.o=-include {}", object.name, path.display())
        })
    }
}

fn header(dir: &Path, object: &Object) -> PathBuf {
    dir.join(format!("{}.h", object.name))
}

/// Checks the symbols of a kernel, as `System.map` lists them.
///
/// # Errors
/// Something is there that should be gone.
pub fn check(map: &str) -> Result<(), ObjectError> {
    let symbols = || map.lines().filter_map(|line| line.split(' ').nth(2));
    for Object { name, gone } in ALL {
        if let Some(symbol) = symbols().find(|symbol| symbol.starts_with(gone)) {
            let symbol = symbol.to_owned();
            return Err(ObjectError::NoEffect { name, symbol });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_headers_of_this_checkout_are_there_and_go_before_their_objects() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../guest-kernel/objects");
        let headers = Headers::read(dir.clone()).unwrap();
        let variables: Vec<String> = headers.variables().collect();
        let path = dir.join("slub.h");
        assert!(variables.contains(&format!("CFLAGS_slub.o=-include {}", path.display())));
        assert!(headers.identity().contains("#undef late_initcall"));
    }

    #[test]
    fn a_header_without_effect_is_named_with_what_is_still_there() {
        let without = "ffffffff81000000 T _text\nffffffff81ef69d0 T apply_retpolines\n";
        check(without).unwrap();
        let with =
            format!("{without}ffffffff81fa0000 d __initcall__kmod_slub__265_7314_slab_late_init7");
        let error = check(&with).unwrap_err().to_string();
        assert!(error.contains("guest-kernel/objects/slub.h"), "{error}");
        assert!(error.contains("slab_late_init7"), "{error}");
    }
}
