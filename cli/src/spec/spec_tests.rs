//! Flags and image configs to specs.

use super::*;
use proptest::prelude::*;

fn image() -> ImageConfig {
    ImageConfig {
        env: Some(vec!["PATH=/image/bin".into(), "COLOUR=red".into()]),
        cmd: Some(vec!["-c".into(), "true".into()]),
        entrypoint: Some(vec!["sh".into()]),
        working_dir: Some("/srv".into()),
        user: None,
    }
}

fn wishes() -> Wishes {
    Wishes {
        id: "0123456789abcdef".into(),
        ..Default::default()
    }
}

fn spec_of(wishes: &Wishes, volumes: &[Volume]) -> Result<Spec, SpecError> {
    of_image(&image(), wishes, volumes, &Accounts::default())
}

fn process(spec: &Spec) -> &Process {
    spec.process().as_ref().expect("a process")
}

#[test]
fn a_command_takes_the_place_of_the_image_s_and_keeps_its_entrypoint() {
    let spec = spec_of(&wishes(), &[]).expect("valid");
    assert_eq!(
        process(&spec).args().as_deref(),
        Some(&["sh".to_owned(), "-c".into(), "true".into()][..])
    );
    let asked = Wishes {
        command: vec!["x".into()],
        ..wishes()
    };
    let spec = spec_of(&asked, &[]).expect("valid");
    assert_eq!(
        process(&spec).args().as_deref(),
        Some(&["sh".to_owned(), "x".into()][..])
    );
}

#[test]
fn no_command_anywhere_is_refused() {
    let nothing = of_image(
        &ImageConfig::default(),
        &wishes(),
        &[],
        &Accounts::default(),
    );
    assert!(matches!(nothing, Err(SpecError::NoCommand)));
}

#[test]
fn the_flags_win_over_the_image_and_the_image_over_the_defaults() {
    let asked = Wishes {
        env: vec!["COLOUR=dark red".into(), "EMPTY=".into()],
        cwd: Some("/usr".into()),
        user: Some("1234:5678".into()),
        tty: true,
        ..wishes()
    };
    let spec = spec_of(&asked, &[]).expect("valid");
    let env = process(&spec).env().clone().expect("an environment");
    for entry in [
        "PATH=/image/bin",
        "HOSTNAME=0123456789ab",
        "TERM=xterm",
        "COLOUR=dark red",
        "EMPTY=",
    ] {
        assert!(env.iter().any(|e| e == entry), "{entry} in {env:?}");
    }
    assert_eq!(env.iter().filter(|e| e.starts_with("COLOUR=")).count(), 1);
    assert_eq!(process(&spec).cwd(), Path::new("/usr"));
    assert_eq!(
        (process(&spec).user().uid(), process(&spec).user().gid()),
        (1234, 5678)
    );
    assert_eq!(spec.hostname().as_deref(), Some("0123456789ab"));
}

#[test]
fn the_root_and_the_volumes_are_paths_of_the_guest() {
    let volume = Volume {
        source: "/home/me".into(),
        destination: "/data".into(),
        read_only: true,
    };
    let asked = Wishes {
        read_only: true,
        ..wishes()
    };
    let spec = spec_of(&asked, &[volume]).expect("valid");
    let root = spec.root().as_ref().expect("a root");
    assert_eq!(
        root.path(),
        Path::new("/run/capsid/share/0123456789abcdef/rootfs")
    );
    assert_eq!(root.readonly(), Some(true));
    let json = String::from_utf8(to_json(&spec).expect("short")).expect("JSON");
    assert!(
        !json.contains("/home/me"),
        "no path of the host is in the guest's spec"
    );
    let mounts = spec.mounts().as_ref().expect("mounts");
    let data = mounts
        .iter()
        .find(|m| m.destination() == Path::new("/data"))
        .expect("the volume");
    assert_eq!(
        data.source().as_deref(),
        Some(Path::new("/run/capsid/share/0123456789abcdef/volumes/0"))
    );
    assert!(data.options().iter().flatten().any(|o| o == "ro"));
}

#[test]
fn a_volume_takes_the_place_of_a_file_of_ours() {
    let volume = Volume {
        source: "/h".into(),
        destination: "/etc/hosts".into(),
        read_only: false,
    };
    let spec = spec_of(&wishes(), &[volume]).expect("valid");
    let mounts = spec.mounts().as_ref().expect("mounts");
    let count = mounts
        .iter()
        .filter(|m| m.destination() == Path::new("/etc/hosts"))
        .count();
    assert_eq!(count, 1);
}

#[test]
fn a_relative_working_directory_is_refused() {
    let asked = Wishes {
        cwd: Some("usr".into()),
        ..wishes()
    };
    assert!(matches!(spec_of(&asked, &[]), Err(SpecError::Cwd(_))));
}

#[test]
fn an_entry_without_a_value_takes_the_caller_s() {
    let lookup = |name: &str| (name == "SET").then(|| "here".to_owned());
    let env = environment(&["SET".into(), "UNSET".into(), "A=b=c".into()], lookup);
    assert_eq!(env.expect("valid"), ["SET=here", "A=b=c"]);
    assert!(environment(&["=x".into()], |_| None).is_err());
}

#[test]
fn a_hostname_is_checked() {
    assert!(hostname(Some("web-1.example"), "id").is_ok());
    for name in ["", "a b", "a\nb", &"x".repeat(64)] {
        assert!(hostname(Some(name), "id").is_err(), "{name:?}");
    }
}

#[test]
fn docker_s_capabilities_are_exactly_docker_s() {
    let spec = spec_of(&wishes(), &[]).expect("valid");
    let capabilities = process(&spec).capabilities().clone().expect("capabilities");
    assert_eq!(
        capabilities.bounding().as_ref().map(|set| set.len()),
        Some(14)
    );
    assert!(capabilities.inheritable().is_none());
}

#[test]
fn a_bundle_keeps_its_own_unless_a_flag_says_otherwise() {
    let bundle = bundle::Bundle {
        spec: serde_json::from_value(json!({"ociVersion": "1.0.2", "root": {"path": "rootfs", "readonly": true},
            "process": {"user": {"uid": 5, "gid": 6}, "args": ["own"], "cwd": "/own", "env": ["A=b"]}}))
        .expect("a spec"),
        root: "/b/rootfs".into(),
        volumes: vec![],
        terminal: false,
    };
    let spec = of_bundle(&bundle, &wishes(), &[], &Accounts::default()).expect("valid");
    assert_eq!(
        process(&spec).args().as_deref(),
        Some(&["own".to_owned()][..])
    );
    assert_eq!(process(&spec).user().uid(), 5);
    assert!(is_read_only(spec.root().as_ref()));
    let asked = Wishes {
        command: vec!["mine".into()],
        user: Some("7:8".into()),
        ..wishes()
    };
    let spec = of_bundle(&bundle, &asked, &[], &Accounts::default()).expect("valid");
    assert_eq!(
        process(&spec).args().as_deref(),
        Some(&["mine".to_owned()][..])
    );
    assert_eq!(process(&spec).user().gid(), 8);
}

proptest! {
    #[test]
    fn any_image_config_makes_a_spec_or_is_refused(
        env: Option<Vec<String>>, cmd: Option<Vec<String>>, entrypoint: Option<Vec<String>>,
        working_dir: Option<String>, user: Option<String>,
    ) {
        let image = ImageConfig { env, cmd, entrypoint, working_dir, user };
        if let Ok(spec) = of_image(&image, &wishes(), &[], &Accounts::default()) {
            prop_assert!(process(&spec).cwd().is_absolute());
            let entries = process(&spec).env().clone().unwrap_or_default();
            prop_assert!(entries.iter().all(|entry| entry.contains('=')));
        }
    }
}
