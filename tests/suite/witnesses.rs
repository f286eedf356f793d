//! No field of the spec is dropped: each has a witness, each witness kills its mutants on every backend, and each
//! link of that chain is shown to hold. What a witness and a mutant are, `moewe::conformance` says.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use moewe::backend::cpu::{CpuBinding, CpuBuffer, CpuEncoder};
use moewe::conformance::vocabulary::{Declaration, vocabulary};
use moewe::conformance::witnesses::{Effect, Special, Witness, witnesses};
use moewe::conformance::{self, Mutant, Outcome, Status};
use moewe::host::Host;
use moewe::kernels::{Activated, Epilogue, GroupedGemm, Operation};
use moewe::plan::{BufferSlice, Launch};
use moewe::schedule::DeviceFacts;
use moewe::spec::*;
use moewe::{Backend, Cpu, Error};
use syn::{Fields, Item, Type};

use crate::rig::{deepseek_like, gpu};

/// What each mutant came to on `cpu`.
pub fn on_cpu() -> &'static [Outcome] {
    static OUTCOMES: OnceLock<Vec<Outcome>> = OnceLock::new();
    OUTCOMES.get_or_init(|| conformance::run(&Cpu::new(), &|_, _| {}))
}

/// Likewise on the device under test.
pub fn on_wgpu() -> &'static [Outcome] {
    static OUTCOMES: OnceLock<Vec<Outcome>> = OnceLock::new();
    OUTCOMES.get_or_init(|| conformance::run(gpu(), &|_, _| {}))
}

/// What no backend has yet.
const REFUSED: [&str; 3] =
    ["precision.block_scale.Exact", "precision.block_scale.Folded", "precision.block_scale.Promoted"];

fn expect_proof<B: Backend>(backend: &B, outcomes: &[Outcome]) {
    let open: Vec<_> = outcomes.iter().filter(|outcome| !outcome.status.holds()).collect();
    assert!(open.is_empty(), "{open:#?}");
    let asked: Vec<_> = outcomes.iter().map(|outcome| (outcome.field.as_str(), outcome.mutant)).collect();
    let fields = vocabulary().fields;
    let all: Vec<_> =
        fields.iter().flat_map(|field| [(field.as_str(), Mutant::Lower), (field, Mutant::Carrier)]).collect();
    assert_eq!(asked, all);
    let mut refused = BTreeSet::new();
    for witness in witnesses() {
        let outcome = outcomes.iter().find(|outcome| outcome.field == witness.field).unwrap();
        if outcome.status != Status::Refused {
            continue;
        }
        match (witness.effect, witness.spec.validate(), moewe::supports(backend, &witness.spec, 48)) {
            (Effect::Nothing(_), _, _) => {}
            // No spec has an integer format with scales of powers of two, or adapters of codes.
            (_, Err(error), _) => {
                let illegal = witness.field.ends_with("Int4.scale.E8m0") || witness.field.starts_with("lora.format.");
                assert!(illegal && outcome.reason.contains(&error.to_string()), "{outcome:?}");
            }
            // Asking gives the answer that planning gave.
            (_, Ok(()), Err(error)) => {
                assert!(outcome.reason.contains(&error.to_string()), "{outcome:?}: {error}");
                refused.insert(witness.field);
            }
            (_, Ok(()), Ok(())) => {
                let error = moewe::supports(backend, &witness.neutral, 48).unwrap_err();
                assert!(outcome.reason.contains(&error.to_string()), "{outcome:?}: {error}");
                refused.insert(witness.field);
            }
        }
    }
    assert_eq!(refused, REFUSED.map(String::from).into());
}

#[test]
fn each_field_acts_or_is_refused_by_name_on_cpu() {
    expect_proof(&Cpu::new(), on_cpu());
}

#[test]
fn each_field_acts_or_is_refused_by_name_on_wgpu() {
    expect_proof(gpu(), on_wgpu());
}

#[test]
fn each_field_has_one_witness_that_changes_it() {
    let fields = vocabulary().fields;
    let mut of: BTreeMap<&str, Vec<Witness>> = fields.iter().map(|field| (field.as_str(), vec![])).collect();
    for witness in witnesses() {
        let field = witness.field.clone();
        of.get_mut(field.as_str()).unwrap_or_else(|| panic!("a witness of {field}, which is no field")).push(witness);
    }
    assert_eq!(of.len(), fields.len(), "a field stands twice in the vocabulary");
    for (field, witnesses) in of {
        let [witness] = witnesses.as_slice() else { panic!("{field} has {} witnesses", witnesses.len()) };
        assert_ne!(witness.neutral, witness.spec, "{field}");
        assert!(witness.name().contains(" to "), "{}", witness.name());
        // It has the field that it is a witness of.
        let text = format!("{:?}", witness.spec);
        assert!(field.split('.').filter(|word| word.parse::<usize>().is_err()).all(|word| text.contains(word)));
    }
}

/// The declarations of the types that a [`MoeSpec`] is made of, from the text of `src/spec/`.
fn declared(text: &str) -> BTreeSet<(String, String, String)> {
    let mut items: BTreeMap<String, Item> = BTreeMap::new();
    for item in syn::parse_file(text).unwrap().items {
        match &item {
            Item::Struct(found) => items.insert(found.ident.to_string(), item),
            Item::Enum(found) => items.insert(found.ident.to_string(), item),
            _ => None,
        };
    }
    let mut found = BTreeSet::new();
    let (mut known, mut next) = (BTreeSet::new(), vec!["MoeSpec".to_owned()]);
    while let Some(name) = next.pop() {
        if !known.insert(name.clone()) {
            continue;
        }
        let mut of = |variant: &str, fields: &Fields| {
            for (at, field) in fields.iter().enumerate() {
                let own = field.ident.as_ref().map_or_else(|| at.to_string(), ToString::to_string);
                found.insert((name.clone(), variant.to_owned(), own));
                next.extend(named(&field.ty).into_iter().filter(|name| items.contains_key(name)));
            }
        };
        match &items[&name] {
            Item::Struct(item) => of("", &item.fields),
            Item::Enum(item) => {
                item.variants.iter().for_each(|variant| of(&variant.ident.to_string(), &variant.fields));
                let variants = item.variants.iter().map(|variant| variant.ident.to_string());
                found.extend(variants.map(|variant| (name.clone(), variant, String::new())));
            }
            _ => unreachable!(),
        }
    }
    found
}

/// The names in a type.
fn named(ty: &Type) -> Vec<String> {
    match ty {
        Type::Path(path) => path
            .path
            .segments
            .iter()
            .flat_map(|segment| {
                let inner = match &segment.arguments {
                    syn::PathArguments::AngleBracketed(arguments) => arguments
                        .args
                        .iter()
                        .flat_map(|argument| match argument {
                            syn::GenericArgument::Type(ty) => named(ty),
                            _ => vec![],
                        })
                        .collect(),
                    _ => vec![],
                };
                [vec![segment.ident.to_string()], inner].concat()
            })
            .collect(),
        Type::Array(array) => named(&array.elem),
        Type::Tuple(tuple) => tuple.elems.iter().flat_map(named).collect(),
        Type::Slice(slice) => named(&slice.elem),
        Type::Reference(reference) => named(&reference.elem),
        _ => panic!("a field of another kind of type: teach this test to look inside"),
    }
}

/// The text of `src/spec/`, but for inner documentation, which only a file may begin with.
fn spec_text() -> String {
    let mut paths: Vec<_> = std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/spec"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    paths.sort();
    let texts = paths.iter().map(|path| std::fs::read_to_string(path).unwrap());
    texts.collect::<Vec<_>>().join("\n").lines().filter(|line| !line.starts_with("//!")).collect::<Vec<_>>().join("\n")
}

/// What the vocabulary lacks of a text, and has too much.
fn difference(text: &str) -> Vec<String> {
    let own = |(name, variant, field): &Declaration| ((*name).into(), (*variant).into(), (*field).into());
    let listed: BTreeSet<(String, String, String)> = vocabulary().declarations.iter().map(own).collect();
    listed
        .symmetric_difference(&declared(text))
        .map(|(name, variant, field)| format!("{name} {variant} {field}"))
        .collect()
}

#[test]
fn the_vocabulary_is_what_the_spec_declares() {
    assert_eq!(difference(&spec_text()), Vec::<String>::new());
}

#[test]
fn a_new_field_variant_or_type_is_missed_by_its_name() {
    let text = spec_text();
    let insert = |behind: &str, what: &str| {
        assert_eq!(text.matches(behind).count(), 1, "{behind}");
        difference(&text.replace(behind, &format!("{behind}\n{what}")))
    };
    assert_eq!(insert("pub struct MoeSpec {", "pub extra: bool,"), ["MoeSpec  extra"]);
    assert_eq!(insert("pub struct Precision {", "pub extra: FloatType,"), ["Precision  extra"]);
    assert_eq!(insert("    SwigluOai {", "extra: f32,"), ["Activation SwigluOai extra"]);
    assert_eq!(insert("    Sparsemixer {", "extra: Option<f32>,"), ["RoutingMethod Sparsemixer extra"]);
    assert_eq!(insert("pub enum NanPolicy {", "Ignore,"), ["NanPolicy Ignore "]);
    assert_eq!(
        insert("pub enum ScaleRule {", "Extra { factor: f32 },"),
        ["ScaleRule Extra ", "ScaleRule Extra factor"]
    );
    let moved = text.replace("pub struct MoeSpec {", "pub struct MoeSpec {\npub extra: Option<Vec<Extra>>,");
    let moved = format!("{moved}\npub struct Extra {{ pub inner: usize }}");
    assert_eq!(difference(&moved), ["Extra  inner", "MoeSpec  extra"]);
    let removed = text.replace("    pub output_bias: bool,\n", "");
    assert_eq!(difference(&removed), ["MoeSpec  output_bias"]);
}

/// What became of both mutants of a witness.
fn statuses<B: Host + Clone + Sync>(backend: &B, witness: &Witness) -> [(Status, String); 2] {
    conformance::try_witness(backend, witness).map(|outcome| (outcome.status, outcome.reason))
}

fn witness_of(field: &str) -> Witness {
    witnesses().into_iter().find(|witness| witness.field == field).unwrap()
}

#[test]
fn a_witness_that_shows_nothing_survives() {
    // Where nothing is rounded the order of a sum is below every tolerance.
    let neutral = deepseek_like();
    let mut spec = neutral.clone();
    spec.precision.combine_order = CombineOrder::Expert;
    let (special, effect) = (Special::No, Effect::Moves);
    let witness = Witness { field: "precision.combine_order.Expert".into(), neutral, spec, special, effect };
    for (status, reason) in statuses(&Cpu::new(), &witness) {
        assert_eq!(status, Status::Survived, "{reason}");
        assert!(reason.contains("moves the reference"), "{reason}");
    }
    // And a field whose name is not the one that is refused is not refused.
    let mut witness = witness_of("precision.block_scale.Folded");
    witness.field = "precision.combine".into();
    assert!(statuses(&Cpu::new(), &witness).iter().all(|(status, _)| *status == Status::Survived));
}

/// Twins that drop something of what they are asked to do, or are lost behind some calls.
#[derive(Clone)]
pub struct Deaf {
    cpu: Cpu,
    drop: fn(&mut Operation),
    /// Those that are left.
    calls: Arc<AtomicUsize>,
}

impl Deaf {
    fn new(drop: fn(&mut Operation)) -> Self {
        Self { cpu: Cpu::new(), drop, calls: Arc::new(AtomicUsize::new(usize::MAX)) }
    }

    /// With the name and the limits of another device, lost behind so many calls.
    pub fn like(facts: DeviceFacts, calls: usize, drop: fn(&mut Operation)) -> Self {
        Self { cpu: Cpu::like(facts), drop, calls: Arc::new(AtomicUsize::new(calls)) }
    }
}

impl Backend for Deaf {
    type Buffer = CpuBuffer;
    type Kernel = Operation;
    type Binding = CpuBinding;
    type Encoder = CpuEncoder;

    fn facts(&self) -> DeviceFacts {
        self.cpu.facts()
    }

    fn create_buffer(&self, name: &str, bytes: u64, uniform: bool) -> moewe::Result<CpuBuffer> {
        self.cpu.create_buffer(name, bytes, uniform)
    }

    fn buffer_bytes(&self, buffer: &CpuBuffer) -> u64 {
        self.cpu.buffer_bytes(buffer)
    }

    fn same_buffer(&self, a: &CpuBuffer, b: &CpuBuffer) -> bool {
        self.cpu.same_buffer(a, b)
    }

    fn write(&self, buffer: &CpuBuffer, offset: u64, words: &[u32]) -> moewe::Result<()> {
        self.cpu.write(buffer, offset, words)
    }

    fn compile(&self, name: &str, operation: &Operation) -> moewe::Result<Operation> {
        let mut operation = operation.clone();
        (self.drop)(&mut operation);
        self.cpu.compile(name, &operation)
    }

    fn compile_all(&self, operations: &[(&str, &Operation)]) -> moewe::Result<Vec<Operation>> {
        operations.iter().map(|(name, operation)| self.compile(name, operation)).collect()
    }

    fn bind(&self, kernel: &Operation, slices: &[BufferSlice<'_, Self>]) -> moewe::Result<CpuBinding> {
        let slices: Vec<BufferSlice<'_, Cpu>> = slices
            .iter()
            .map(|BufferSlice { buffer, offset, bytes }| BufferSlice {
                buffer: *buffer,
                offset: *offset,
                bytes: *bytes,
            })
            .collect();
        self.cpu.bind(kernel, &slices)
    }

    fn copy_word(&self, encoder: &mut CpuEncoder, from: (&CpuBuffer, u64), to: &CpuBuffer) {
        self.cpu.copy_word(encoder, from, to);
    }

    fn launch(
        &self,
        encoder: &mut CpuEncoder,
        launches: &mut dyn Iterator<Item = Launch<'_, Self>>,
    ) -> moewe::Result<()> {
        let count = |calls: usize| calls.checked_sub(1);
        if self.calls.fetch_update(Ordering::Relaxed, Ordering::Relaxed, count).is_err() {
            return Err(Error::Device { backend: "cpu", operation: "running".into(), reason: "lost".into() });
        }
        let mut launches = launches.map(|Launch { kernel, binding, workgroups, params }| Launch::<Cpu> {
            kernel,
            binding,
            workgroups,
            params,
        });
        self.cpu.launch(encoder, &mut launches)
    }
}

impl Host for Deaf {
    fn encoder(&self) -> CpuEncoder {
        self.cpu.encoder()
    }

    fn submit(&self, encoder: CpuEncoder) -> moewe::Result<()> {
        self.cpu.submit(encoder)
    }

    fn read(&self, buffer: &CpuBuffer) -> moewe::Result<Vec<u32>> {
        self.cpu.read(buffer)
    }

    fn time(
        &self,
        count: usize,
        record: &mut dyn FnMut(&mut CpuEncoder, usize) -> moewe::Result<()>,
    ) -> moewe::Result<(Vec<f64>, &'static str)> {
        self.cpu.time(count, record)
    }
}

#[test]
fn a_backend_that_drops_a_field_is_found_by_that_field() {
    let limit: fn(&mut Operation) = |operation| {
        if let Operation::GroupedGemm(GroupedGemm { epilogue: Epilogue::Activation(activated), .. }) = operation {
            let Activated { activation, .. } = activated;
            if let Activation::Swiglu { limit } = activation {
                *limit = None;
            }
        }
    };
    let bias: fn(&mut Operation) = |operation| {
        if let Operation::TopkRouting(kernel) = operation
            && let RoutingMethod::TopK { key, .. } = &mut kernel.method
        {
            *key = SelectionKey::Score;
        }
    };
    let scale: fn(&mut Operation) = |operation| {
        if let Operation::TopkRouting(kernel) = operation {
            kernel.weight_scale = 1.0;
        }
    };
    for (drop, field) in [
        (limit, "experts.activation.Swiglu.limit"),
        (limit, "shared.mlp.activation.Swiglu.limit"),
        (bias, "routing.method.TopK.key.ScorePlusBias"),
        (scale, "routing.routed_scaling_factor"),
    ] {
        for (status, reason) in statuses(&Deaf::new(drop), &witness_of(field)) {
            assert_eq!(status, Status::Survived, "{field}: {reason}");
            assert!(reason.contains("is wrong by") || reason.contains("fails"), "{field}: {reason}");
        }
        let nothing = Deaf::new(|_| {});
        assert!(statuses(&nothing, &witness_of(field)).iter().all(|(status, _)| *status == Status::Killed));
    }
}

#[test]
fn a_device_that_fails_proves_nothing() {
    let witness = witness_of("top_k");
    // The layer as it is takes six calls; the device is lost behind them.
    let lost = Deaf { calls: Arc::new(AtomicUsize::new(6)), ..Deaf::new(|_| {}) };
    for (status, reason) in statuses(&lost, &witness) {
        assert_eq!(status, Status::Survived, "{reason}");
        assert!(reason.contains("the device failed"), "{reason}");
    }
}
