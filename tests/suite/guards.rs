//! Guard 1: no consumer of the spec may skip a field or a variant. The compiler checks exhaustive
//! patterns; this scan forbids the forms that would keep it quiet.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use syn::visit::{self, Visit};
use syn::{Item, Pat};

/// Names of the spec's types; the value says whether a pattern on it can fail (an enum of several variants).
fn spec_types() -> HashMap<String, bool> {
    let mut paths = vec![];
    sources(&root().join("src/spec"), &mut paths);
    let items = |path| syn::parse_file(&std::fs::read_to_string(path).unwrap()).unwrap().items;
    let types: HashMap<_, _> = paths
        .iter()
        .flat_map(items)
        .filter_map(|item| match item {
            Item::Struct(item) => Some((item.ident.to_string(), false)),
            Item::Enum(item) => Some((item.ident.to_string(), item.variants.len() > 1)),
            _ => None,
        })
        .collect();
    assert!(types.len() > 40 && !types["Routing"] && types["RoutingMethod"] && types["WeightFormat"]);
    types
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

struct Scan<'a> {
    types: &'a HashMap<String, bool>,
    self_type: Option<String>,
    file: String,
    found: Vec<String>,
}

impl Scan<'_> {
    /// The spec type that a path such as `RoutingMethod::TopK` or `Self::TopK` names.
    fn spec_type(&self, path: &syn::Path) -> Option<(&str, bool)> {
        path.segments.iter().find_map(|segment| {
            let name = segment.ident.to_string();
            let name = if name == "Self" { self.self_type.clone()? } else { name };
            self.types.get_key_value(&name).map(|(name, refutable)| (name.as_str(), *refutable))
        })
    }

    /// The spec type that a pattern matches at its top, through references, alternatives and bindings.
    fn matched(&self, pat: &Pat) -> Option<(&str, bool)> {
        match pat {
            Pat::Struct(pat) => self.spec_type(&pat.path),
            Pat::TupleStruct(pat) => self
                .spec_type(&pat.path)
                // `Some(Enum::Variant)` can hide variants just as well.
                .or_else(|| pat.elems.iter().find_map(|pat| self.matched(pat))),
            Pat::Path(pat) => self.spec_type(&pat.path),
            Pat::Or(pat) => pat.cases.iter().find_map(|pat| self.matched(pat)),
            Pat::Reference(pat) => self.matched(&pat.pat),
            Pat::Paren(pat) => self.matched(&pat.pat),
            Pat::Ident(pat) => pat.subpat.as_ref().and_then(|(_, pat)| self.matched(pat)),
            _ => None,
        }
    }

    fn report(&mut self, span: proc_macro2::Span, what: &str) {
        self.found.push(format!("{}:{}: {what}", self.file, span.start().line));
    }

    fn refutable(&mut self, pat: &Pat) {
        if let Some((name, true)) = self.matched(pat) {
            let what = format!("a pattern on {name} that skips its other variants: use match");
            self.report(syn::spanned::Spanned::span(pat), &what);
        }
    }
}

/// A pattern that takes anything: `_` or a plain binding.
fn takes_all(pat: &Pat) -> bool {
    match pat {
        Pat::Wild(_) => true,
        Pat::Ident(pat) => pat.subpat.is_none() && pat.ident.to_string().starts_with(char::is_lowercase),
        Pat::Or(pat) => pat.cases.iter().any(takes_all),
        _ => false,
    }
}

impl<'ast> Visit<'ast> for Scan<'_> {
    fn visit_item_impl(&mut self, item: &'ast syn::ItemImpl) {
        let name = |ty: &syn::Type| match ty {
            syn::Type::Path(path) => path.path.segments.last().map(|segment| segment.ident.to_string()),
            _ => None,
        };
        let outer = std::mem::replace(&mut self.self_type, name(&item.self_ty));
        let default = item.trait_.as_ref().is_some_and(|(_, path, _)| path.is_ident("Default"));
        let spec = self.self_type.as_ref().is_some_and(|name| self.types.contains_key(name));
        if default && spec {
            self.report(item.impl_token.span, "Default on a spec type");
        }
        visit::visit_item_impl(self, item);
        self.self_type = outer;
    }

    fn visit_item_mod(&mut self, item: &'ast syn::ItemMod) {
        let test = item.attrs.iter().any(|attribute| attribute.path().is_ident("cfg"));
        if !test {
            visit::visit_item_mod(self, item);
        }
    }

    fn visit_pat_struct(&mut self, pat: &'ast syn::PatStruct) {
        if let (Some((name, _)), Some(rest)) = (self.spec_type(&pat.path), &pat.rest) {
            let what = format!("`..` in a pattern on {name}");
            self.report(rest.dot2_token.spans[0], &what);
        }
        visit::visit_pat_struct(self, pat);
    }

    fn visit_expr_struct(&mut self, expr: &'ast syn::ExprStruct) {
        if let (Some((name, _)), Some(dots)) = (self.spec_type(&expr.path), &expr.dot2_token) {
            let what = format!("`..` fills fields of {name}");
            self.report(dots.spans[0], &what);
        }
        visit::visit_expr_struct(self, expr);
    }

    fn visit_expr_match(&mut self, expr: &'ast syn::ExprMatch) {
        // Each position of a tuple is a match of its own.
        let columns: Vec<Vec<&Pat>> = expr
            .arms
            .iter()
            .flat_map(|arm| match &arm.pat {
                Pat::Or(pat) => pat.cases.iter().collect::<Vec<_>>(),
                pat => vec![pat],
            })
            .map(|pat| match pat {
                Pat::Tuple(pat) => pat.elems.iter().collect(),
                pat => vec![pat],
            })
            .collect();
        for at in 0..columns.iter().map(Vec::len).max().unwrap_or(0) {
            let column: Vec<&Pat> = columns.iter().filter_map(|row| row.get(at).copied()).collect();
            let named = column.iter().find_map(|pat| self.matched(pat)).filter(|(_, refutable)| *refutable);
            let wild = column.iter().find(|pat| takes_all(pat));
            if let (Some((name, _)), Some(wild)) = (named, wild) {
                let what = format!("an arm that takes every other {name}");
                self.report(syn::spanned::Spanned::span(*wild), &what);
            }
        }
        visit::visit_expr_match(self, expr);
    }

    fn visit_expr_let(&mut self, expr: &'ast syn::ExprLet) {
        self.refutable(&expr.pat);
        visit::visit_expr_let(self, expr);
    }

    fn visit_local(&mut self, local: &'ast syn::Local) {
        if local.init.as_ref().is_some_and(|init| init.diverge.is_some()) {
            self.refutable(&local.pat);
        }
        visit::visit_local(self, local);
    }

    fn visit_macro(&mut self, mac: &'ast syn::Macro) {
        if mac.path.is_ident("matches") {
            let named: HashSet<String> = mac.tokens.clone().into_iter().map(|token| token.to_string()).collect();
            if let Some(name) =
                self.types.iter().find_map(|(name, many)| (*many && named.contains(name)).then_some(name))
            {
                let what = format!("`matches!` on {name}: use match");
                self.report(syn::spanned::Spanned::span(&mac.path), &what);
            }
        }
    }

    fn visit_attribute(&mut self, _: &'ast syn::Attribute) {}
}

fn scan(file: &str, text: &str) -> Vec<String> {
    let types = spec_types();
    let mut scan = Scan { types: &types, self_type: None, file: file.into(), found: vec![] };
    scan.visit_file(&syn::parse_file(text).unwrap());
    if file.starts_with("src/spec/") {
        let derives = text.lines().enumerate().filter(|(_, line)| line.contains("derive(") && line.contains("Default"));
        scan.found.extend(derives.map(|(line, _)| format!("{file}:{}: Default on a spec type", line + 1)));
    }
    scan.found
}

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

#[test]
fn no_consumer_skips_a_field_or_a_variant_of_the_spec() {
    let mut paths = vec![];
    sources(&root().join("src"), &mut paths);
    assert!(paths.len() > 20);
    let found: Vec<String> = paths
        .iter()
        .flat_map(|path| {
            let name = path.strip_prefix(root()).unwrap().to_string_lossy().replace('\\', "/");
            scan(&name, &std::fs::read_to_string(path).unwrap())
        })
        .collect();
    assert!(found.is_empty(), "{}", found.join("\n"));
}

#[test]
fn the_scan_finds_each_form_that_it_forbids() {
    for (text, what) in [
        ("fn f(r: Routing) { let Routing { method, .. } = r; }", "`..` in a pattern"),
        ("fn f(m: RoutingMethod) { match m { RoutingMethod::TopK { score, .. } => {} } }", "`..` in a pattern"),
        ("fn f(s: Score) { match s { Score::Softmax => {} _ => {} } }", "an arm that takes every other Score"),
        ("fn f(s: Score) { match s { Score::Softmax => {} other => {} } }", "an arm that takes every other Score"),
        ("fn f(s: Option<Score>) { match s { Some(Score::Softmax) => {} _ => {} } }", "every other Score"),
        ("fn f(s: Score) { match (s, 1) { (Score::Softmax, _) => {} (_, 2) => {} } }", "every other Score"),
        ("fn f(r: ScaleRule) { match r { ScaleRule::FlooredScale { .. } => {} } }", "`..` in a pattern"),
        ("fn f(f: WeightFormat) { match f { WeightFormat::F32 => {} _ => {} } }", "every other WeightFormat"),
        ("fn f(s: Score) { if let Score::Softmax = s {} }", "skips its other variants"),
        ("fn f(s: Score) { let Score::Softmax = s else { return }; }", "skips its other variants"),
        ("fn f(s: Score) -> bool { matches!(s, Score::Softmax) }", "`matches!` on Score"),
        ("fn f(p: Precision) -> Precision { Precision { model: x, ..p } }", "`..` fills fields of Precision"),
        ("impl Default for MoeSpec { fn default() -> Self { todo() } }", "Default on a spec type"),
        ("impl Score { fn f(self) { match self { Self::Softmax => {} _ => {} } } }", "every other Score"),
    ] {
        let found = scan("snippet", text);
        assert!(found.iter().any(|line| line.contains(what)), "{text}: {found:?}");
    }
    let fine = "fn f(s: Score, r: Routing) { match s { Score::Softmax => {} Score::Sigmoid | Score::Identity => {} }
        let Routing { method: _, renormalize } = r; if let Some(SharedExperts { mlp }) = x {} }";
    assert_eq!(scan("snippet", fine), Vec::<String>::new());
}
