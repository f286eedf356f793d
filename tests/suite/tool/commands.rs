//! What holds for every command.

use std::process::{Command, Stdio};

use serde_json::Value;

use super::{moewe, text};
use crate::samples::golden;

/// Each command with arguments that end soon, and whether it reports, in JSON too.
fn commands() -> Vec<(&'static str, Vec<String>)> {
    let owned = |args: &[&str]| args.iter().map(|arg| (*arg).to_owned()).collect::<Vec<_>>();
    let case = golden("mixtral");
    let case = text(&case);
    vec![
        ("run", owned(&[case, "--backend", "cpu", "--tokens", "2"])),
        ("inspect", owned(&[case, "--explain"])),
        ("verify", owned(&[case, "--backend", "cpu"])),
        ("bench", owned(&["--backend", "reference", "--case", "dsv3_fp8,qwen3_30b_bf16", "--tokens", "1"])),
        ("tune", owned(&["--backend", "cpu", "--case", "qwen3_30b_bf16", "--scale", "0.001", "--tokens", "1"])),
        ("conformance", owned(&["--backend", "cpu"])),
    ]
}

/// Those of `moewe --help`.
pub fn listed() -> Vec<String> {
    let help = moewe(["--help"]);
    assert_eq!(help.code, 0);
    let after = help.stdout.split("Commands:\n").nth(1).unwrap();
    let lines = after.lines().take_while(|line| !line.is_empty());
    let names = lines.filter_map(|line| line.strip_prefix("  ")?.split(' ').next().map(str::to_owned));
    names.filter(|name| !name.is_empty() && name != "help").collect()
}

#[test]
fn every_command_has_help_with_an_example_and_says_what_its_exit_status_means() {
    for name in listed() {
        let help = moewe([name.as_str(), "--help"]);
        assert_eq!((help.code, help.stderr.as_str()), (0, ""), "{name}");
        for part in [&format!("\n  moewe {name} "), "Example", "--json", "Exit status: 0 ", "Usage: moewe "] {
            assert!(help.stdout.contains(part), "{name}: no {part:?} in {}", help.stdout);
        }
        let unknown = moewe([name.as_str(), "--no-such-option"]);
        assert_eq!((unknown.code, unknown.stdout.as_str()), (2, ""), "{name}");
        assert!(unknown.stderr.contains("--no-such-option"), "{name}: {}", unknown.stderr);
    }
}

#[test]
fn with_json_standard_output_holds_whole_objects_and_nothing_else() {
    let commands = commands();
    for name in listed() {
        // Its own tests have it; it takes adapters as they are.
        if name == "doctor" {
            continue;
        }
        let (_, args) = commands.iter().find(|(known, _)| *known == name).unwrap_or_else(|| panic!("{name} is new"));
        let all: Vec<&str> = [name.as_str()].into_iter().chain(args.iter().map(String::as_str)).collect();
        let said = moewe(all.iter().copied().chain(["--json"]));
        assert!(said.stdout.ends_with('\n'), "{name}");
        let lines = said.lines();
        assert!(!lines.is_empty() && lines.iter().all(Value::is_object), "{name}");
        // Progress is for terminals, and these are fine: nothing to complain of but what cannot be timed.
        let complains = said.stderr.lines().any(|line| !line.starts_with("error: "));
        assert!(!complains && (said.code == 0 || name == "bench"), "{name}: {}", said.stderr);
        assert!((0..=3).contains(&said.code));
    }
}

/// `moewe ... | head -1` and less: the verdict is the exit status, whoever reads the text or not.
#[test]
fn a_closed_pipe_is_no_complaint_and_changes_no_verdict() {
    for (name, args) in commands() {
        // It takes a minute; and it prints once, at its end, as `run` does.
        if name == "conformance" {
            continue;
        }
        for json in [&[][..], &["--json"]] {
            let command = || {
                let mut command = Command::new(env!("CARGO_BIN_EXE_moewe"));
                command.arg(name).args(&args).args(json).stderr(Stdio::piped());
                command
            };
            let expected = command().output().unwrap().status.code();
            let mut child = command().stdout(Stdio::piped()).spawn().unwrap();
            drop(child.stdout.take());
            let output = child.wait_with_output().unwrap();
            assert_eq!(output.status.code(), expected, "{name}");
            let stderr = String::from_utf8_lossy(&output.stderr);
            assert!(!stderr.contains("panic") && !stderr.contains("pipe"), "{name}: {stderr}");
        }
    }
    for help in [&["--help"][..], &["--version"], &["run", "--help"]] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_moewe"));
        let mut child = command.args(help).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stderr), "", "{help:?}");
        assert!(output.status.code().is_some_and(|code| code == 0), "{help:?}");
    }
}

/// On a terminal, which util-linux's `script` makes.
#[test]
#[cfg(target_os = "linux")]
fn bars_are_for_terminals() {
    let tool = env!("CARGO_BIN_EXE_moewe");
    let drawn = |redirect: &str| {
        let command = format!("{tool} bench --backend cpu --case qwen3_30b_fp8 --scale 0.001 --tokens 1{redirect}");
        let said = Command::new("script").args(["-qec", &command, "/dev/null"]).stdin(Stdio::null()).output().unwrap();
        String::from_utf8_lossy(&said.stdout).into_owned()
    };
    let said = drawn("");
    assert!(
        said.contains("\rqwen3_30b_fp8: 1 tokens ░") && said.contains("░  50 %") && said.contains("\u{1b}[K"),
        "{said}"
    );
    // The table stands in lines of its own.
    assert!(
        said.lines().any(|line| line.contains("\u{1b}[Kqwen3_30b_fp8 ") && line.contains(" 1 true     pass ")),
        "{said}"
    );
    assert!(!drawn(" 2>/dev/null").contains('\u{1b}'));
}
