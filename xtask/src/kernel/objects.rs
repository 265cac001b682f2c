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
    effect: Effect,
}

/// What the kernel's symbols show of a header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Effect {
    /// None begins with this any more.
    Gone(&'static str),
    /// One begins with this.
    There(&'static str),
}

/// All of them.
const ALL: [Object; 5] = [
    Object {
        name: "alternative",
        effect: Effect::Gone("patch_retpoline"),
    },
    Object {
        name: "direct",
        effect: Effect::There("config_copy_address"),
    },
    Object {
        name: "early",
        effect: Effect::There("early_config_copy_address"),
    },
    Object {
        name: "enlighten",
        effect: Effect::There("xen_is_not_looked_for"),
    },
    Object {
        name: "slub",
        effect: Effect::Gone("__initcall__kmod_slub__"),
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
    /// A header left in what it should leave out.
    #[error("{OBJECTS}/{name}.h does nothing to this source: there is still {symbol}")]
    Still {
        /// The object.
        name: &'static str,
        /// What should be gone.
        symbol: String,
    },
    /// What a header adds is not there.
    #[error("{OBJECTS}/{name}.h does nothing to this source: there is no {symbol}")]
    Missing {
        /// The object.
        name: &'static str,
        /// What should be there.
        symbol: &'static str,
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
/// Something is there that should be gone, or the other way round.
pub fn check(map: &str) -> Result<(), ObjectError> {
    let find = |start| {
        let mut symbols = map.lines().filter_map(|line| line.split(' ').nth(2));
        symbols.find(|symbol| symbol.starts_with(start))
    };
    for Object { name, effect } in ALL {
        match effect {
            Effect::Gone(start) => {
                if let Some(symbol) = find(start) {
                    let symbol = symbol.to_owned();
                    return Err(ObjectError::Still { name, symbol });
                }
            }
            Effect::There(symbol) if find(symbol).is_none() => {
                return Err(ObjectError::Missing { name, symbol });
            }
            Effect::There(_) => {}
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
        let without = "ffffffff81000000 T _text\nffffffff81ef69d0 T apply_retpolines\n\
            ffffffff82a01230 b config_copy_address\nffffffff82a01234 b early_config_copy_address\n\
            ffffffff81ee9400 t xen_is_not_looked_for\n";
        check(without).unwrap();
        let error = check("ffffffff81000000 T _text\n").unwrap_err().to_string();
        assert!(
            error.ends_with("there is no config_copy_address"),
            "{error}"
        );
        let with =
            format!("{without}ffffffff81fa0000 d __initcall__kmod_slub__265_7314_slab_late_init7");
        let error = check(&with).unwrap_err().to_string();
        assert!(error.contains("guest-kernel/objects/slub.h"), "{error}");
        assert!(error.contains("slab_late_init7"), "{error}");
    }
}
