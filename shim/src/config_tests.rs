//! What a configuration may say, in a file or in containerd's.

use super::*;
use crate::cgroup::CgroupPath;
use proptest::prelude::*;
use protobuf::well_known_types::any::Any;

fn body(text: &str) -> Options {
    Options {
        config_body: Some(text.to_owned()),
        ..Options::default()
    }
}

fn parsed(text: &str) -> Config {
    Config::load(&body(text)).expect("a configuration")
}

fn refused(text: &str) -> String {
    let error = Config::load(&body(text)).expect_err("refused").to_string();
    let place = "options in containerd's configuration";
    error
        .strip_prefix(place)
        .unwrap_or_else(|| panic!("{error}"))
        .to_owned()
}

/// A message with these fields: number, and text or a number.
fn message(type_url: &str, texts: &[(u8, &str)], numbers: &[(u8, u8)]) -> Any {
    let mut any = Any {
        type_url: type_url.to_owned(),
        ..Any::default()
    };
    for (field, text) in texts {
        let length = u8::try_from(text.len()).expect("shorter than 128");
        any.value.extend([field << 3 | 2, length]);
        any.value.extend(text.bytes());
    }
    for (field, number) in numbers {
        any.value.extend([field << 3, *number]);
    }
    any
}

#[test]
fn every_key_has_its_place() {
    let config = parsed(
        "vmm = \"/opt/vmm\"\nkernel = \"/opt/vmlinux\"\ninitramfs = \"/opt/i.cpio\"\nmemory_mib = 512\ncpus = 2\nboot_timeout_s = 300\n\
         allow_software_kvm = true\ndebug_console = true\n",
    );
    let expected = Config {
        vmm: Some("/opt/vmm".into()),
        kernel: Some("/opt/vmlinux".into()),
        initramfs: Some("/opt/i.cpio".into()),
        memory: MemoryMib::literal(512),
        cpus: Cpus::literal(2),
        boot_timeout: Duration::from_secs(300),
        allow_software_kvm: true,
        debug_console: true,
    };
    assert_eq!(config, expected);
    assert_eq!(KEYS.len(), 8, "each of them is above");
    assert_eq!(parsed("# nothing\n"), Config::default());
}

#[test]
fn the_page_about_it_has_every_key_and_what_holds_without_it() {
    let page = include_str!("../../docs/configuration.md");
    let example = page
        .split("```")
        .nth(1)
        .and_then(|text| text.strip_prefix("toml"));
    let example = example.expect("an example");
    assert_eq!(parsed(example), Config::default());
    for (key, _) in KEYS {
        let is_key = |line: &str| {
            line.trim_start_matches("# ")
                .starts_with(&format!("{key} = "))
        };
        assert_eq!(
            example.lines().filter(|line| is_key(line)).count(),
            1,
            "{key}"
        );
    }
}

#[test]
fn an_unknown_key_is_refused_with_the_nearest() {
    assert_eq!(
        refused("memory = 1"),
        ": memory is not a known key; the nearest is memory_mib"
    );
    assert_eq!(
        refused("Kernel = 1"),
        ": Kernel is not a known key; the nearest is kernel"
    );
    assert_eq!(
        refused("boot-timeout-s = 1"),
        ": boot-timeout-s is not a known key; the nearest is boot_timeout_s"
    );
    assert!(refused("[hypervisor]\nx = 1").starts_with(": hypervisor is not a known key"));
    assert!(refused("\"a\\nb\" = 1").starts_with(": a\\nb is not"));
}

#[test]
fn a_value_that_cannot_be_is_refused_with_its_key() {
    let table = [
        (
            "memory_mib = 63",
            ": memory_mib: 63 MiB of memory: a VM has 64 to 524288 MiB",
        ),
        (
            "memory_mib = -1",
            ": memory_mib: expected a whole number that is not negative",
        ),
        (
            "memory_mib = \"512\"",
            ": memory_mib: expected a whole number that is not negative",
        ),
        ("cpus = 33", ": cpus: 33 cpus: a VM has 1 to 32"),
        (
            "boot_timeout_s = 0",
            ": boot_timeout_s: 0 s: expected 1 to 600",
        ),
        (
            "debug_console = 1",
            ": debug_console: expected true or false",
        ),
        (
            "kernel = \"vmlinux\"",
            ": kernel: expected an absolute path in quotes",
        ),
    ];
    for (text, expected) in table {
        assert_eq!(refused(text), expected);
    }
}

#[test]
fn what_is_not_toml_is_refused_with_its_line() {
    let error = refused("cpus = 1\nmemory_mib\n");
    assert!(
        error.starts_with(", line 2: ") && !error.contains('\n'),
        "{error}"
    );
    assert!(refused("cpus = 1\ncpus = 2\n").starts_with(", line 2: "));
    assert!(refused(&"x = [".repeat(10_000)).starts_with(", line 1: "));
    let long = format!("# {}", "x".repeat(CONFIG_MAX_BYTES));
    assert_eq!(refused(&long), " is longer than 65536 bytes");
}

#[test]
fn keys_of_containerd_s_own_are_no_keys_of_a_file() {
    assert_eq!(
        parsed("TypeUrl = \"x\"\nConfigPath = \"\"\ncpus = 2\n").cpus,
        Cpus::literal(2)
    );
    let error = Config::parse("TypeUrl = \"x\"", "here", &[]).expect_err("refused");
    assert!(
        error
            .to_string()
            .starts_with("here: TypeUrl is not a known key")
    );
}

#[test]
fn a_named_file_must_be_there_and_be_one() {
    let named = |path: &Path| Options {
        config_path: Some(path.to_owned()),
        ..Options::default()
    };
    let path = std::env::temp_dir().join(format!("capsid-config-{}.toml", std::process::id()));
    let missing = Config::load(&named(&path)).expect_err("missing");
    assert_eq!(
        missing.to_string(),
        format!("cannot read the configuration {}", path.display())
    );
    std::fs::write(&path, "cpus = 4\n").expect("written");
    let read = Config::load(&named(&path));
    std::fs::write(&path, "cpu = 4\n").expect("written");
    let misspelt = Config::load(&named(&path));
    std::fs::remove_file(&path).expect("removed");
    rustix::fs::mkfifoat(rustix::fs::CWD, &path, 0o600.into()).expect("a pipe");
    let pipe = Config::load(&named(&path));
    std::fs::remove_file(&path).expect("removed");
    assert_eq!(read.expect("a configuration").cpus, Cpus::literal(4));
    let expected = format!(
        "{}: cpu is not a known key; the nearest is cpus",
        path.display()
    );
    assert_eq!(misspelt.expect_err("refused").to_string(), expected);
    assert!(
        matches!(pipe, Err(ConfigError::Read { .. })),
        "a pipe does not hold us"
    );
}

#[test]
fn software_kvm_is_refused_with_the_key_that_allows_it() {
    assert!(WITH_SOFTWARE_KVM.ends_with(CONFIG_PATH));
    let key = WITH_SOFTWARE_KVM.split_whitespace().nth(3);
    assert!(KEYS.iter().any(|(name, _)| Some(*name) == key));
    let refused = Config::default().check_kvm();
    let allowed = parsed("allow_software_kvm = true").check_kvm();
    // What this machine has decides; what it says of software is the same everywhere.
    if let (Err(KvmError::Software { otherwise, .. }), allowed) = (refused, allowed) {
        assert_eq!(otherwise, WITH_SOFTWARE_KVM);
        allowed.expect("allowed");
    }
}

#[test]
fn options_come_as_either_message() {
    assert_eq!(Options::decode(None).expect("none"), Options::default());
    assert_eq!(
        Options::decode(Some(&Any::default())).expect("empty"),
        Options::default()
    );
    let generic = [(1, "toml"), (2, "/etc/x.toml"), (3, "cpus = 2")];
    for name in [
        "runtimeoptions.v1.Options",
        "type.googleapis.com/runtimeoptions.v1.Options",
    ] {
        let options = Options::decode(Some(&message(name, &generic, &[]))).expect("options");
        assert_eq!(options.config_path, Some("/etc/x.toml".into()));
        assert_eq!(options.config_body.as_deref(), Some("cpus = 2"));
    }
    let texts = [(3, "/system.slice/shims"), (6, "runc"), (7, "/run/runc")];
    let runc = message(
        "containerd.runc.v1.Options",
        &texts,
        &[(1, 1), (4, 100), (5, 101), (9, 1)],
    );
    let options = Options::decode(Some(&runc)).expect("options");
    let place = CgroupPath::parse(Path::new("/system.slice/shims")).expect("a cgroup");
    assert_eq!(
        (options.shim_cgroup, options.io_owner),
        (Some(place), (100, 101))
    );
    assert_eq!((options.config_path, options.config_body), (None, None));
}

#[test]
fn options_that_say_nothing_are_none() {
    let empty = message("runtimeoptions.v1.Options", &[(2, ""), (3, "")], &[]);
    assert_eq!(
        Options::decode(Some(&empty)).expect("options"),
        Options::default()
    );
    let empty = message("containerd.runc.v1.Options", &[(3, "")], &[]);
    assert_eq!(
        Options::decode(Some(&empty)).expect("options"),
        Options::default()
    );
}

#[test]
fn options_of_another_kind_are_refused() {
    let said = |any: Any| {
        Options::decode(Some(&any))
            .expect_err("refused")
            .to_string()
    };
    let error = said(message("containerd.windows.v1.Options", &[], &[]));
    let expected = "the runtime's options are of type containerd.windows.v1.Options, expected runtimeoptions.v1.Options or containerd.runc.v1.Options";
    assert_eq!(error, expected);
    let error = said(message("runtimeoptions.v1.Options", &[], &[(2, 1)]));
    assert_eq!(
        error,
        "field 2 of the runtime's options is not what it should be"
    );
    let error = said(message("containerd.runc.v1.Options", &[(4, "x")], &[]));
    assert_eq!(
        error,
        "field 4 of the runtime's options is not what it should be"
    );
    let error = said(message("containerd.runc.v1.Options", &[(3, "../x")], &[]));
    assert_eq!(
        error,
        "the runtime's options have a ShimCgroup that is none"
    );
    let mut broken = message("runtimeoptions.v1.Options", &[(2, "/x")], &[]);
    broken.value.pop();
    assert_eq!(
        said(broken),
        "the runtime's options are no runtimeoptions.v1.Options"
    );
    let mut long = message("runtimeoptions.v1.Options", &[], &[]);
    long.value = vec![0; 131_073];
    assert_eq!(
        said(long),
        "the runtime's options are 131073 bytes long, at most 131072 are read"
    );
}

proptest! {
    #[test]
    fn any_text_is_a_configuration_or_refused_on_one_line(text: String) {
        if let Err(error) = Config::load(&body(&text)) {
            prop_assert!(!error.to_string().contains(char::is_control));
        }
    }

    #[test]
    fn any_bytes_are_options_or_refused(value: Vec<u8>, runc: bool) {
        let name = if runc { "containerd.runc.v1.Options" } else { "runtimeoptions.v1.Options" };
        let _either = Options::decode(Some(&Any { type_url: name.to_owned(), value, ..Any::default() }));
    }

    #[test]
    fn any_distance_names_a_key(name: String) {
        let nearest = nearest(&name);
        prop_assert!(KEYS.iter().any(|(key, _)| *key == nearest));
    }
}
