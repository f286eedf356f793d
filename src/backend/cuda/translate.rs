//! WGSL kernels as CUDA C++: the portable kernels of `cuda` are the texts of `shaders/`, so that what a field means
//! stands in one place for every vendor.
//!
//! Translates naga's representation of what our kernels use; anything else is refused by name. Every expression
//! becomes a constant of its own, vectors are computed by component, and a function is given the globals that it uses
//! as arguments, so that `__restrict__` survives inlining. A long file: one walk over one representation.

use std::collections::HashMap;
use std::fmt::Write as _;

use naga::proc::TypeResolution;
use naga::valid::{Capabilities, FunctionInfo, ModuleInfo, ValidationFlags, Validator};
use naga::{
    AddressSpace, ArraySize, AtomicFunction, BinaryOperator, Block, BuiltIn, Constant, Expression, Function,
    GlobalVariable, Handle, Literal, MathFunction, Module, RelationalFunction, Scalar, ScalarKind, Statement,
    StorageAccess, Type, TypeInner, UnaryOperator,
};

/// A kernel in CUDA C++.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Translated {
    /// The text, without headers.
    pub text: String,
    /// Threads of a block.
    pub threads: [u32; 3],
    /// Bytes that a block shares beside those that the text declares.
    pub shared_bytes: u32,
    /// Number of the uniform binding, if there is one.
    pub uniform: Option<usize>,
    /// Bindings, by number, whose sizes in bytes follow the pointers as `unsigned long long`.
    pub sized: Vec<usize>,
    /// Which bindings, by number, it may write.
    pub written: Vec<bool>,
    /// Whether a last `unsigned long long` follows: not 0 where the kernel need not wait for the one before it, but only
    /// may not end before that.
    pub may_be_early: bool,
}

/// Name of the entry point.
pub const ENTRY: &str = "moewe_kernel";

/// Lets the next kernel come, once all blocks are here. Only behind the wait: a kernel that is early knows that all but
/// the one before it is done.
const LAUNCH_DEPENDENTS: &str = "asm volatile(\"griddepcontrol.launch_dependents;\")";

/// What CUDA C++ lacks of WGSL's types.
const PRELUDE: &str = "\
struct bool2 { bool x, y; };
struct bool3 { bool x, y, z; };
struct bool4 { bool x, y, z, w; };
static __device__ __forceinline__ float2 unpack2x16float(unsigned word) {
    float2 pair;
    asm(\"{ .reg .b16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high; }\"
        : \"=f\"(pair.x), \"=f\"(pair.y) : \"r\"(word));
    return pair;
}
";

/// What CUDA has of functions that our shaders spell out, by name: what stands first in their bodies. Exactly the same
/// where the function says that it is exact.
const NATIVE: [(&str, &str); 4] = [
    // Quotients and products on integers; what may be below the normal numbers is theirs.
    (
        "divide",
        "    {
        const unsigned bits = __float_as_uint(__fdiv_rn(__uint_as_float(argument_0), __uint_as_float(argument_1)));
        if ((bits & 0x7fffffffu) > 0x00800000u) {
            return bits > 0x7f800000u ? 0x7fc00000u : bits;
        }
    }
",
    ),
    (
        "multiply",
        "    {
        const unsigned bits = __float_as_uint(__fmul_rn(__uint_as_float(argument_0), __uint_as_float(argument_1)));
        if ((bits & 0x7fffffffu) > 0x00800000u) {
            return bits > 0x7f800000u ? 0x7fc00000u : bits;
        }
    }
",
    ),
    (
        "nearest_e4m3",
        "#if __CUDA_ARCH__ >= 890
    {
        unsigned short codes;
        asm(\"cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;\" : \"=h\"(codes) : \"f\"(0.0f), \"f\"(__uint_as_float(argument_0)));
        return codes;
    }
#endif
",
    ),
    // Without branches: 2^(x log2 e) with what the product has lost, and an inverse within an ulp, which may be subnormal.
    (
        "times_sigmoid",
        "    {
        // Where the exponential is nothing beside 1 it need not know more: an infinite one would lose an infinity.
        const float x = fminf(fmaxf(-argument_1, -104.0f), 88.0f), power = x * 1.44269502f;
        const float lost = fmaf(x, 1.44269502f, -power) + x * 1.92596299e-8f;
        float exponential;
        asm(\"ex2.approx.f32 %0, %1;\" : \"=f\"(exponential) : \"f\"(power));
        exponential = fmaf(exponential, lost * 0.693147182f, exponential);
        float inverse;
        asm(\"rcp.approx.f32 %0, %1;\" : \"=f\"(inverse) : \"f\"(1.0f + exponential));
        const unsigned quotient = __float_as_uint(argument_0 * inverse);
        const unsigned given = __float_as_uint(argument_0), bits = argument_1 < -88.0f ? 0x80000000u : quotient;
        return __uint_as_float(given == 0xff800000u || (given & 0x7fffffffu) > 0x7f800000u ? 0x7fc00000u : bits);
    }
",
    ),
];

/// Translates a module with one entry point.
///
/// # Errors
/// What naga says of a module that is not valid; or what this translator lacks.
pub fn translate(wgsl: &str) -> Result<Translated, String> {
    let (module, info) = parse(wgsl)?;
    Writer { module: &module, info: &info, text: PRELUDE.into() }.kernel()
}

/// Puts a kernel in CUDA C++ behind the functions of a module without entry point, so that it can call them: by their
/// own names, without the buffers that they read. It finds the module's constants and structures too, and begins with
/// `KERNEL { WAIT; ...`. The constants `THREADS`, `BLOCKS` and `SHARED_BYTES` are those of its blocks: their threads, how
/// many a multiprocessor should hold at least, and what each shares as `extern __shared__`.
///
/// # Errors
/// As [`translate`].
pub fn translate_around(wgsl: &str, kernel: &str) -> Result<Translated, String> {
    let (module, info) = parse(wgsl)?;
    Writer { module: &module, info: &info, text: PRELUDE.into() }.around(kernel)
}

fn parse(wgsl: &str) -> Result<(Module, ModuleInfo), String> {
    let module = naga::front::wgsl::parse_str(wgsl).map_err(|error| error.emit_to_string(wgsl))?;
    let info = Validator::new(ValidationFlags::all(), Capabilities::SHADER_FLOAT16_IN_FLOAT32)
        .validate(&module)
        .map_err(|error| error.emit_to_string(wgsl))?;
    Ok((module, info))
}

const AXES: [&str; 4] = ["x", "y", "z", "w"];

struct Writer<'a> {
    module: &'a Module,
    info: &'a ModuleInfo,
    text: String,
}

impl Writer<'_> {
    /// Types, variables that a block shares, and functions.
    fn declarations(&mut self) -> Result<(), String> {
        for (handle, ty) in self.module.types.iter() {
            self.define(handle, ty)?;
        }
        for (handle, global) in self.module.global_variables.iter() {
            match global.space {
                AddressSpace::WorkGroup => {
                    let line = format!("__shared__ {} {};\n", self.type_name(global.ty)?, self.global_name(handle));
                    self.text.push_str(&line);
                }
                AddressSpace::Storage { access: _ } | AddressSpace::Uniform | AddressSpace::Private => {}
                space => return Err(format!("a variable in {space:?}")),
            }
        }
        for (handle, function) in self.module.functions.iter() {
            let text = self.function(handle, function)?;
            self.text.push_str(&text);
        }
        Ok(())
    }

    /// The pointers by which a kernel is given its buffers.
    fn pointers(&self) -> Result<Vec<String>, String> {
        let pointer =
            |(handle, global): (_, _)| Ok(format!("{} {}", self.pointer_type(global)?, self.global_name(handle)));
        self.bindings().into_iter().map(pointer).collect()
    }

    fn written(&self) -> Vec<bool> {
        let written = |global: &GlobalVariable| match global.space {
            AddressSpace::Storage { access } => access.contains(StorageAccess::STORE),
            _ => false,
        };
        self.bindings().iter().map(|(_, global)| written(global)).collect()
    }

    fn uniform(&self) -> Option<usize> {
        self.bindings().iter().position(|(_, global)| global.space == AddressSpace::Uniform)
    }

    /// A kernel may be launched while the one before it ends, and waits for that. Its pointers pass through the wait, or
    /// the compiler could read ahead of it.
    fn wait(&self) -> String {
        let pointers = self.bindings().into_iter().map(|(handle, _)| format!("\"+l\"({})", self.global_name(handle)));
        let pointers = pointers.collect::<Vec<_>>().join(", ");
        format!("asm volatile(\"griddepcontrol.wait;\" : {pointers} :: \"memory\")")
    }

    fn around(mut self, kernel: &str) -> Result<Translated, String> {
        if !self.module.entry_points.is_empty() {
            return Err("an entry point beside that in CUDA C++".into());
        }
        self.declarations()?;
        for (handle, constant) in self.module.constants.iter() {
            if let (Some(name), TypeInner::Scalar(_)) = (&constant.name, &self.module.types[constant.ty].inner) {
                let value = self.constant(handle)?;
                let _ = writeln!(self.text, "#define {name} {value}");
            }
        }
        for (handle, function) in self.module.functions.iter() {
            let own: Vec<_> = (0..function.arguments.len()).map(|at| format!("a{at}")).collect();
            let given = self.bindings().into_iter().filter(|(global, _)| !self.info[handle][*global].is_empty());
            let all = own.iter().cloned().chain(given.map(|(global, _)| self.global_name(global)));
            let (own, all) = (own.join(", "), all.collect::<Vec<_>>().join(", "));
            if let Some(name) = &function.name {
                let _ = writeln!(self.text, "#define {name}({own}) {}({all})", self.function_name(handle));
            }
        }
        let (arguments, uniform, written) = (self.pointers()?.join(", "), self.uniform(), self.written());
        let _ = write!(
            self.text,
            "#if __CUDA_ARCH__ >= 900\n#define WAIT {}; {LAUNCH_DEPENDENTS}\n#else\n#define WAIT\n#endif\n\
             #define KERNEL extern \"C\" __global__ void __launch_bounds__(THREADS, BLOCKS) {ENTRY}({arguments})\n\
             #define KERNEL_WITH(...) extern \"C\" __global__ void __launch_bounds__(THREADS, BLOCKS) \
             {ENTRY}({arguments}, __VA_ARGS__)\n{kernel}",
            self.wait()
        );
        let (threads, shared_bytes) = (self.number("THREADS")?, self.number("SHARED_BYTES")?);
        self.number("BLOCKS")?;
        Ok(Translated {
            text: self.text,
            threads: [threads, 1, 1],
            shared_bytes,
            uniform,
            sized: vec![],
            written,
            may_be_early: false,
        })
    }

    /// A constant of the module that a kernel in CUDA C++ has to have.
    fn number(&self, name: &str) -> Result<u32, String> {
        let constants = self.module.constants.iter().map(|(_, constant)| constant);
        let value = constants.filter(|constant| constant.name.as_deref() == Some(name)).find_map(|constant| match self
            .module
            .global_expressions[constant.init]
        {
            Expression::Literal(Literal::U32(value)) => Some(value),
            _ => None,
        });
        value.ok_or_else(|| format!("a kernel in CUDA C++ without the constant {name}: u32"))
    }

    fn kernel(mut self) -> Result<Translated, String> {
        let [entry] = &self.module.entry_points[..] else {
            return Err(format!("{} entry points, expected one", self.module.entry_points.len()));
        };
        self.declarations()?;
        let info = self.info.get_entry_point(0);
        let mut body = Body::new(&self, &entry.function, info);
        let (uniform, written) = (self.uniform(), self.written());
        let mut arguments = self.pointers()?;
        let queried = |(handle, _): &(Handle<GlobalVariable>, &GlobalVariable)| {
            info[*handle].contains(naga::valid::GlobalUse::QUERY)
        };
        let sized: Vec<_> = self.bindings().into_iter().filter(queried).map(|(handle, _)| handle).collect();
        arguments.extend(sized.iter().map(|&handle| format!("unsigned long long {}_bytes", self.global_name(handle))));
        let number = |handle: &Handle<GlobalVariable>| {
            let binding = self.module.global_variables[*handle].binding;
            binding.map(|binding| binding.binding as usize).ok_or("a global without a binding")
        };
        let sized = sized.iter().map(number).collect::<Result<_, _>>()?;
        for (at, argument) in entry.function.arguments.iter().enumerate() {
            let Some(naga::Binding::BuiltIn(builtin)) = argument.binding else {
                return Err("an argument of the entry point that is no built-in value".into());
            };
            let flat = "threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)";
            let value = match builtin {
                BuiltIn::WorkGroupId => "make_uint3(blockIdx.x, blockIdx.y, blockIdx.z)",
                BuiltIn::NumWorkGroups => "make_uint3(gridDim.x, gridDim.y, gridDim.z)",
                BuiltIn::LocalInvocationId => "make_uint3(threadIdx.x, threadIdx.y, threadIdx.z)",
                BuiltIn::LocalInvocationIndex => flat,
                BuiltIn::GlobalInvocationId => {
                    "make_uint3(blockIdx.x * blockDim.x + threadIdx.x, blockIdx.y * blockDim.y + threadIdx.y, \
                     blockIdx.z * blockDim.z + threadIdx.z)"
                }
                other => return Err(format!("the built-in value {other:?}")),
            };
            let ty = self.type_name(argument.ty)?;
            let _ = writeln!(body.text, "    const {ty} argument_{at} = {value};");
        }
        for (handle, global) in self.passed().filter(|(_, global)| global.space == AddressSpace::Private) {
            let value = global.init.map_or(Ok("{}".into()), |init| self.constant_expression(init))?;
            let _ = writeln!(body.text, "    {} {} = {value};", self.type_name(global.ty)?, self.global_name(handle));
        }
        body.locals()?;
        body.block(&entry.function.body, 1)?;
        let text = body.text;
        let threads = entry.workgroup_size;
        let bound = threads.iter().product::<u32>();
        let name = |argument: &String| argument.rsplit(' ').next().unwrap_or_default().to_owned();
        let (names, arguments) = (arguments.iter().map(name).collect::<Vec<_>>().join(", "), arguments.join(", "));
        let (wait, launch) = (self.wait(), LAUNCH_DEPENDENTS);
        let _ = write!(
            self.text,
            "static __device__ __forceinline__ void body({arguments}) {{\n{text}}}\n\
             extern \"C\" __global__ void __launch_bounds__({bound}) {ENTRY}({arguments}, unsigned long long early) {{\n\
             #if __CUDA_ARCH__ >= 900\n    if (early == 0) {{\n        {wait};\n    }}\n    {launch};\n#endif\n    \
             body({names});\n\
             #if __CUDA_ARCH__ >= 900\n    if (early != 0) {{\n        {wait};\n    }}\n#endif\n}}\n"
        );
        Ok(Translated { text: self.text, threads, shared_bytes: 0, uniform, sized, written, may_be_early: true })
    }

    /// Buffers, in the order of their numbers.
    fn bindings(&self) -> Vec<(Handle<GlobalVariable>, &GlobalVariable)> {
        let mut bindings: Vec<_> =
            self.module.global_variables.iter().filter(|(_, global)| global.binding.is_some()).collect();
        bindings.sort_by_key(|(_, global)| global.binding.map(|binding| binding.binding));
        bindings
    }

    /// What functions are given of the globals: buffers, and variables of an invocation's own, which the entry point
    /// holds.
    fn passed(&self) -> impl Iterator<Item = (Handle<GlobalVariable>, &GlobalVariable)> {
        let private = |(_, global): &(_, &GlobalVariable)| global.space == AddressSpace::Private;
        self.bindings().into_iter().chain(self.module.global_variables.iter().filter(private))
    }

    /// Type of the argument by which a function is given a global.
    fn argument_type(&self, global: &GlobalVariable) -> Result<String, String> {
        match global.space {
            AddressSpace::Private => Ok(format!("{}&", self.type_name(global.ty)?)),
            _ => self.pointer_type(global),
        }
    }

    fn define(&mut self, handle: Handle<Type>, ty: &Type) -> Result<(), String> {
        let number = handle.index();
        match &ty.inner {
            TypeInner::Struct { members, span: _ } => {
                let mut text = format!("struct {} {{", self.type_name(handle)?);
                for (at, member) in members.iter().enumerate() {
                    let _ = write!(text, " {} {};", self.type_name(member.ty)?, member_name(member, at));
                }
                let _ = writeln!(self.text, "{text} }};");
            }
            TypeInner::Array { base, size: ArraySize::Constant(size), stride: _ } => {
                let _ = writeln!(self.text, "struct Array_{number} {{ {} at[{size}]; }};", self.type_name(*base)?);
            }
            _ => {}
        }
        Ok(())
    }

    fn type_name(&self, handle: Handle<Type>) -> Result<String, String> {
        match &self.module.types[handle].inner {
            TypeInner::Struct { .. } => {
                let ty = &self.module.types[handle];
                Ok(ty.name.clone().unwrap_or_else(|| format!("Struct_{}", handle.index())))
            }
            TypeInner::Array { size: ArraySize::Constant(_), .. } => Ok(format!("Array_{}", handle.index())),
            TypeInner::Pointer { base, space: _ } => Ok(format!("{}*", self.type_name(*base)?)),
            inner => inner_name(inner),
        }
    }

    fn resolved_name(&self, resolution: &TypeResolution) -> Result<String, String> {
        match resolution {
            TypeResolution::Handle(handle) => self.type_name(*handle),
            TypeResolution::Value(inner) => inner_name(inner),
        }
    }

    fn global_name(&self, handle: Handle<GlobalVariable>) -> String {
        let name = self.module.global_variables[handle].name.as_deref();
        // What a kernel in CUDA C++ calls by its own name is a pointer; the rest cannot meet another name.
        format!("{}_", name.map_or_else(|| format!("global_{}", handle.index()), str::to_owned))
    }

    /// Type of the pointer to a buffer; to its first element, where it is an array of any length.
    fn pointer_type(&self, global: &GlobalVariable) -> Result<String, String> {
        let element = match &self.module.types[global.ty].inner {
            TypeInner::Array { base, size: ArraySize::Dynamic, stride: _ } => *base,
            _ => global.ty,
        };
        let element = self.type_name(element)?;
        Ok(match global.space {
            AddressSpace::Storage { access } if access.contains(StorageAccess::STORE) => {
                format!("{element}* __restrict__")
            }
            _ => format!("const {element}* __restrict__"),
        })
    }

    fn function(&self, handle: Handle<Function>, function: &Function) -> Result<String, String> {
        let info = &self.info[handle];
        let mut arguments = vec![];
        for (at, argument) in function.arguments.iter().enumerate() {
            let ty = self.type_name(argument.ty)?;
            let constant = if ty.ends_with('*') { "" } else { "const " };
            arguments.push(format!("{constant}{ty} argument_{at}"));
        }
        for (global, variable) in self.passed() {
            if !info[global].is_empty() {
                arguments.push(format!("{} {}", self.argument_type(variable)?, self.global_name(global)));
            }
        }
        let result = function.result.as_ref().map_or(Ok("void".into()), |result| self.type_name(result.ty))?;
        let mut body = Body::new(self, function, info);
        body.locals()?;
        body.block(&function.body, 1)?;
        let (name, own) = (self.function_name(handle), function.name.as_deref().unwrap_or_default());
        let native = NATIVE.iter().find(|(known, _)| *known == own).map_or("", |(_, text)| text);
        let arguments = arguments.join(", ");
        Ok(format!("static __device__ __forceinline__ {result} {name}({arguments}) {{\n{native}{}}}\n", body.text))
    }

    fn function_name(&self, handle: Handle<Function>) -> String {
        let name = self.module.functions[handle].name.as_deref().unwrap_or("function");
        format!("{name}_{}", handle.index())
    }

    fn constant(&self, handle: Handle<Constant>) -> Result<String, String> {
        self.constant_expression(self.module.constants[handle].init)
    }

    /// An expression of the module: a tree of literals.
    fn constant_expression(&self, handle: Handle<Expression>) -> Result<String, String> {
        match &self.module.global_expressions[handle] {
            Expression::Literal(value) => literal(value),
            Expression::Constant(constant) => self.constant(*constant),
            Expression::ZeroValue(ty) => self.zero(*ty),
            Expression::Compose { ty, components } => {
                let components = components.iter().map(|&part| self.constant_expression(part));
                self.compose(*ty, &components.collect::<Result<Vec<_>, _>>()?)
            }
            Expression::Splat { size, value } => {
                let value = self.constant_expression(*value)?;
                let inner = self.info[handle].inner_with(&self.module.types);
                let (Some(scalar), count) = (inner.scalar(), *size as usize) else {
                    return Err(format!("a splat of {inner:?}"));
                };
                Ok(make(scalar, count, &vec![value; count])?)
            }
            other => Err(format!("the constant expression {other:?}")),
        }
    }

    fn zero(&self, ty: Handle<Type>) -> Result<String, String> {
        Ok(format!("{}{{}}", self.type_name(ty)?))
    }

    /// A vector of scalars and vectors that are flat already, an array or a structure.
    fn compose(&self, ty: Handle<Type>, parts: &[String]) -> Result<String, String> {
        match &self.module.types[ty].inner {
            TypeInner::Vector { size, scalar } => make(*scalar, *size as usize, parts),
            TypeInner::Array { .. } => Ok(format!("{}{{ {{ {} }} }}", self.type_name(ty)?, parts.join(", "))),
            TypeInner::Struct { .. } => Ok(format!("{}{{ {} }}", self.type_name(ty)?, parts.join(", "))),
            inner => Err(format!("a value of {inner:?} of parts")),
        }
    }
}

fn member_name(member: &naga::StructMember, at: usize) -> String {
    member.name.clone().unwrap_or_else(|| format!("member_{at}"))
}

fn scalar_name(scalar: Scalar) -> Result<&'static str, String> {
    match (scalar.kind, scalar.width) {
        (ScalarKind::Bool, _) => Ok("bool"),
        (ScalarKind::Sint, 4) => Ok("int"),
        (ScalarKind::Uint, 4) => Ok("unsigned"),
        (ScalarKind::Float, 4) => Ok("float"),
        (kind, width) => Err(format!("{kind:?} of {width} bytes")),
    }
}

fn vector_name(scalar: Scalar, size: usize) -> Result<String, String> {
    let stem = match scalar_name(scalar)? {
        "unsigned" => "uint",
        other => other,
    };
    Ok(format!("{stem}{size}"))
}

fn inner_name(inner: &TypeInner) -> Result<String, String> {
    match inner {
        TypeInner::Scalar(scalar) | TypeInner::Atomic(scalar) => Ok(scalar_name(*scalar)?.into()),
        TypeInner::Vector { size, scalar } => vector_name(*scalar, *size as usize),
        other => Err(format!("the type {other:?}")),
    }
}

/// A vector of its components, which may be vectors only if there is one.
fn make(scalar: Scalar, size: usize, parts: &[String]) -> Result<String, String> {
    if parts.len() != size {
        return Err(format!("a vector of {size} from {} parts", parts.len()));
    }
    Ok(format!("{}{{ {} }}", vector_name(scalar, size)?, parts.join(", ")))
}

fn literal(value: &Literal) -> Result<String, String> {
    match value {
        Literal::F32(value) => Ok(format!("__uint_as_float({:#010x}u)", value.to_bits())),
        Literal::U32(value) => Ok(format!("{value}u")),
        Literal::I32(i32::MIN) => Ok("(-2147483647 - 1)".into()),
        Literal::I32(value) => Ok(format!("({value})")),
        Literal::Bool(value) => Ok(value.to_string()),
        other => Err(format!("the literal {other:?}")),
    }
}

/// The statements of one function.
struct Body<'a> {
    writer: &'a Writer<'a>,
    function: &'a Function,
    info: &'a FunctionInfo,
    /// Values that have a name.
    named: HashMap<Handle<Expression>, String>,
    /// Labels of the `continuing` blocks of the loops around, innermost last; a flag says whether it is used.
    loops: Vec<(usize, bool)>,
    labels: usize,
    text: String,
}

impl<'a> Body<'a> {
    fn new(writer: &'a Writer<'a>, function: &'a Function, info: &'a FunctionInfo) -> Self {
        Self { writer, function, info, named: HashMap::new(), loops: vec![], labels: 0, text: String::new() }
    }

    fn locals(&mut self) -> Result<(), String> {
        for (handle, local) in self.function.local_variables.iter() {
            let ty = self.writer.type_name(local.ty)?;
            let value = match local.init {
                None => "{}".into(),
                Some(init) => self.value(init)?,
            };
            let _ = writeln!(self.text, "    {ty} local_{} = {value};", handle.index());
        }
        Ok(())
    }

    fn inner(&self, handle: Handle<Expression>) -> &'a TypeInner {
        self.info[handle].ty.inner_with(&self.writer.module.types)
    }

    fn is_pointer(&self, handle: Handle<Expression>) -> bool {
        matches!(self.inner(handle), TypeInner::Pointer { .. } | TypeInner::ValuePointer { .. })
    }

    fn line(&mut self, depth: usize, line: &str) {
        let _ = writeln!(self.text, "{:1$}{line}", "", 4 * depth);
    }

    fn block(&mut self, block: &Block, depth: usize) -> Result<(), String> {
        block.iter().try_for_each(|statement| self.statement(statement, depth))
    }

    /// A block in braces.
    fn scope(&mut self, head: &str, block: &Block, depth: usize) -> Result<(), String> {
        self.line(depth, &format!("{head}{{"));
        self.block(block, depth + 1)?;
        self.line(depth, "}");
        Ok(())
    }

    fn name(&mut self, handle: Handle<Expression>, value: &str, depth: usize) -> Result<(), String> {
        let ty = self.writer.resolved_name(&self.info[handle].ty)?;
        let name = format!("value_{}", handle.index());
        self.line(depth, &format!("const {ty} {name} = {value};"));
        self.named.insert(handle, name);
        Ok(())
    }

    fn statement(&mut self, statement: &Statement, depth: usize) -> Result<(), String> {
        match statement {
            Statement::Emit(range) => {
                for handle in range.clone() {
                    // Places are written where they are used.
                    if !self.is_pointer(handle) {
                        let value = self.expression(handle)?;
                        self.name(handle, &value, depth)?;
                    }
                }
            }
            Statement::Block(block) => self.scope("", block, depth)?,
            Statement::If { condition, accept, reject } => {
                let condition = self.value(*condition)?;
                self.scope(&format!("if ({condition}) "), accept, depth)?;
                if !reject.is_empty() {
                    self.scope("else ", reject, depth)?;
                }
            }
            Statement::Loop { body, continuing, break_if } => {
                let label = self.labels;
                self.labels += 1;
                self.loops.push((label, false));
                self.line(depth, "while (true) {");
                self.scope("", body, depth + 1)?;
                if let Some((_, true)) = self.loops.pop() {
                    self.line(depth + 1, &format!("continuing_{label}: ;"));
                }
                self.block(continuing, depth + 1)?;
                if let Some(condition) = break_if {
                    let condition = self.value(*condition)?;
                    self.line(depth + 1, &format!("if ({condition}) break;"));
                }
                self.line(depth, "}");
            }
            Statement::Break => self.line(depth, "break;"),
            Statement::Continue => {
                let Some((label, used)) = self.loops.last_mut() else {
                    return Err("continue outside of a loop".into());
                };
                *used = true;
                let line = format!("goto continuing_{label};");
                self.line(depth, &line);
            }
            Statement::Return { value } => {
                let value = value.map(|value| self.value(value)).transpose()?;
                self.line(depth, &value.map_or("return;".into(), |value| format!("return {value};")));
            }
            Statement::ControlBarrier(_) => self.line(depth, "__syncthreads();"),
            Statement::Store { pointer, value } => {
                let (place, value) = (self.place(*pointer)?, self.value(*value)?);
                self.line(depth, &format!("{place} = {value};"));
            }
            Statement::Call { function, arguments, result } => {
                let mut values = vec![];
                for &argument in arguments {
                    let place = self.is_pointer(argument);
                    values.push(if place { format!("&{}", self.place(argument)?) } else { self.value(argument)? });
                }
                let called = &self.writer.info[*function];
                for (global, _) in self.writer.passed() {
                    if !called[global].is_empty() {
                        values.push(self.writer.global_name(global));
                    }
                }
                let call = format!("{}({})", self.writer.function_name(*function), values.join(", "));
                match result {
                    None => self.line(depth, &format!("{call};")),
                    Some(result) => self.name(*result, &call, depth)?,
                }
            }
            Statement::Atomic { pointer, fun, value, result } => {
                let (place, value) = (self.place(*pointer)?, self.value(*value)?);
                let function = match fun {
                    AtomicFunction::Add => "atomicAdd",
                    AtomicFunction::And => "atomicAnd",
                    AtomicFunction::InclusiveOr => "atomicOr",
                    AtomicFunction::Min => "atomicMin",
                    AtomicFunction::Max => "atomicMax",
                    other => return Err(format!("the atomic operation {other:?}")),
                };
                let call = format!("{function}(&{place}, {value})");
                match result {
                    None => self.line(depth, &format!("{call};")),
                    Some(result) => self.name(*result, &call, depth)?,
                }
            }
            Statement::WorkGroupUniformLoad { pointer, result } => {
                let place = self.place(*pointer)?;
                self.line(depth, "__syncthreads();");
                self.name(*result, &place, depth)?;
                self.line(depth, "__syncthreads();");
            }
            other => return Err(format!("the statement {other:?}")),
        }
        Ok(())
    }

    /// What a pointer points to.
    fn place(&self, handle: Handle<Expression>) -> Result<String, String> {
        match &self.function.expressions[handle] {
            Expression::LocalVariable(local) => Ok(format!("local_{}", local.index())),
            Expression::FunctionArgument(at) => Ok(format!("(*argument_{at})")),
            Expression::GlobalVariable(global) => {
                let (variable, name) =
                    (&self.writer.module.global_variables[*global], self.writer.global_name(*global));
                let inner = &self.writer.module.types[variable.ty].inner;
                let whole = matches!(variable.space, AddressSpace::WorkGroup | AddressSpace::Private)
                    || matches!(inner, TypeInner::Array { size: ArraySize::Dynamic, .. });
                Ok(if whole { name } else { format!("(*{name})") })
            }
            Expression::AccessIndex { base, index } => {
                self.member(self.place(*base)?, self.pointee(*base)?, *index as usize)
            }
            Expression::Access { base, index } => {
                let (place, index) = (self.place(*base)?, self.value(*index)?);
                Ok(match self.pointee(*base)? {
                    TypeInner::Array { size: ArraySize::Dynamic, .. } => format!("{place}[{index}]"),
                    TypeInner::Array { .. } => format!("{place}.at[{index}]"),
                    TypeInner::Vector { .. } => format!("(&{place}.x)[{index}]"),
                    other => return Err(format!("an index into {other:?}")),
                })
            }
            other => Err(format!("a pointer to {other:?}")),
        }
    }

    /// Type of what a pointer points to, if that has parts.
    fn pointee(&self, handle: Handle<Expression>) -> Result<&'a TypeInner, String> {
        match self.inner(handle) {
            TypeInner::Pointer { base, space: _ } => Ok(&self.writer.module.types[*base].inner),
            other => Err(format!("{other:?} as a pointer")),
        }
    }

    fn member(&self, of: String, ty: &TypeInner, index: usize) -> Result<String, String> {
        match ty {
            TypeInner::Array { size: ArraySize::Dynamic, .. } => Ok(format!("{of}[{index}]")),
            TypeInner::Array { .. } => Ok(format!("{of}.at[{index}]")),
            TypeInner::Struct { members, span: _ } => {
                let member = members.get(index).ok_or("a structure without this member")?;
                Ok(format!("{of}.{}", member_name(member, index)))
            }
            TypeInner::Vector { .. } => Ok(format!("{of}.{}", AXES[index.min(3)])),
            other => Err(format!("a part of {other:?}")),
        }
    }

    /// The value of an expression, by name if it has one.
    fn value(&self, handle: Handle<Expression>) -> Result<String, String> {
        match self.named.get(&handle) {
            Some(name) => Ok(name.clone()),
            None => self.expression(handle),
        }
    }

    /// Component `at` of an operand; of a scalar the scalar.
    fn component(&self, handle: Handle<Expression>, at: usize) -> Result<String, String> {
        let value = self.value(handle)?;
        Ok(match self.inner(handle) {
            TypeInner::Vector { .. } => format!("{value}.{}", AXES[at]),
            _ => value,
        })
    }

    /// `each` component of an expression.
    fn by_component(
        &self,
        handle: Handle<Expression>,
        each: &dyn Fn(usize) -> Result<String, String>,
    ) -> Result<String, String> {
        match self.inner(handle) {
            TypeInner::Scalar(_) => each(0),
            TypeInner::Vector { size, scalar } => {
                let parts = (0..*size as usize).map(each).collect::<Result<Vec<_>, _>>()?;
                make(*scalar, *size as usize, &parts)
            }
            other => Err(format!("an operation on {other:?}")),
        }
    }

    fn scalar(&self, handle: Handle<Expression>) -> Result<Scalar, String> {
        let inner = self.inner(handle);
        inner.scalar().ok_or_else(|| format!("an operation on {inner:?}"))
    }

    fn expression(&self, handle: Handle<Expression>) -> Result<String, String> {
        match &self.function.expressions[handle] {
            Expression::Literal(value) => literal(value),
            Expression::Constant(constant) => self.writer.constant(*constant),
            Expression::ZeroValue(ty) => self.writer.zero(*ty),
            Expression::Compose { ty, components } => {
                let mut parts = vec![];
                for &component in components {
                    let vector = match (&self.writer.module.types[*ty].inner, self.inner(component)) {
                        (TypeInner::Vector { .. }, TypeInner::Vector { size, scalar: _ }) => *size as usize,
                        _ => 0,
                    };
                    let value = self.value(component)?;
                    match vector {
                        0 => parts.push(value),
                        size => parts.extend(AXES[..size].iter().map(|axis| format!("{value}.{axis}"))),
                    }
                }
                self.writer.compose(*ty, &parts)
            }
            Expression::Access { base, index } => {
                let (value, index) = (self.value(*base)?, self.value(*index)?);
                match self.inner(*base) {
                    TypeInner::Array { .. } => Ok(format!("{value}.at[{index}]")),
                    // Not through memory: `value` is in registers.
                    TypeInner::Vector { size, scalar: _ } => {
                        let last = *size as usize - 1;
                        let tests = (0..last).map(|at| format!("{index} == {at} ? {value}.{} : ", AXES[at]));
                        Ok(format!("({}{value}.{})", tests.collect::<String>(), AXES[last]))
                    }
                    other => Err(format!("an index into {other:?}")),
                }
            }
            Expression::AccessIndex { base, index } => {
                self.member(self.value(*base)?, self.inner(*base), *index as usize)
            }
            Expression::Splat { size, value } => {
                let (scalar, value) = (self.scalar(*value)?, self.value(*value)?);
                make(scalar, *size as usize, &vec![value; *size as usize])
            }
            Expression::Swizzle { size, vector, pattern } => {
                let (scalar, value) = (self.scalar(*vector)?, self.value(*vector)?);
                let parts = pattern[..*size as usize].iter().map(|axis| format!("{value}.{}", AXES[*axis as usize]));
                make(scalar, *size as usize, &parts.collect::<Vec<_>>())
            }
            Expression::FunctionArgument(at) => Ok(format!("argument_{at}")),
            Expression::Load { pointer } => {
                let place = self.place(*pointer)?;
                // What other threads change is read each time.
                Ok(match self.inner(*pointer) {
                    TypeInner::Pointer { base, space: _ } => match self.writer.module.types[*base].inner {
                        TypeInner::Atomic(scalar) => format!("*(volatile {}*)&{place}", scalar_name(scalar)?),
                        _ => place,
                    },
                    _ => place,
                })
            }
            Expression::Unary { op, expr } => {
                let kind = self.scalar(*expr)?.kind;
                self.by_component(handle, &|at| {
                    let value = self.component(*expr, at)?;
                    Ok(match (op, kind) {
                        (UnaryOperator::Negate, ScalarKind::Sint) => format!("int(0u - unsigned({value}))"),
                        (UnaryOperator::Negate, _) => format!("-{value}"),
                        (UnaryOperator::LogicalNot, _) => format!("!{value}"),
                        (UnaryOperator::BitwiseNot, _) => format!("~{value}"),
                    })
                })
            }
            Expression::Binary { op, left, right } => {
                let kind = self.scalar(*left)?.kind;
                self.by_component(handle, &|at| {
                    binary(*op, kind, &self.component(*left, at)?, &self.component(*right, at)?)
                })
            }
            Expression::Select { condition, accept, reject } => {
                if let TypeInner::Scalar(_) = self.inner(*condition) {
                    let (yes, no) = (self.value(*accept)?, self.value(*reject)?);
                    return Ok(format!("{} ? {yes} : {no}", self.value(*condition)?));
                }
                self.by_component(handle, &|at| {
                    let (yes, no) = (self.component(*accept, at)?, self.component(*reject, at)?);
                    Ok(format!("{} ? {yes} : {no}", self.component(*condition, at)?))
                })
            }
            Expression::Relational { fun, argument } => {
                let joint = match fun {
                    RelationalFunction::All => " & ",
                    RelationalFunction::Any => " | ",
                    other => return Err(format!("the function {other:?}")),
                };
                let count = self.size(*argument);
                let parts = (0..count).map(|at| self.component(*argument, at)).collect::<Result<Vec<_>, _>>()?;
                Ok(format!("bool({})", parts.join(joint)))
            }
            Expression::Math { fun, arg, arg1, arg2, arg3: _ } => self.math(handle, *fun, *arg, *arg1, *arg2),
            Expression::As { expr, kind, convert } => {
                let from = self.scalar(*expr)?.kind;
                self.by_component(handle, &|at| cast(from, *kind, convert.is_some(), &self.component(*expr, at)?))
            }
            Expression::ArrayLength(pointer) => match &self.function.expressions[*pointer] {
                Expression::GlobalVariable(global) => {
                    let variable = &self.writer.module.global_variables[*global];
                    let TypeInner::Array { base: _, size: _, stride } = self.writer.module.types[variable.ty].inner
                    else {
                        return Err("the length of what is no array".into());
                    };
                    Ok(format!("unsigned({}_bytes / {stride}u)", self.writer.global_name(*global)))
                }
                other => Err(format!("the length of {other:?}")),
            },
            other => Err(format!("the expression {other:?}")),
        }
    }

    fn size(&self, handle: Handle<Expression>) -> usize {
        match self.inner(handle) {
            TypeInner::Vector { size, scalar: _ } => *size as usize,
            _ => 1,
        }
    }

    fn math(
        &self,
        handle: Handle<Expression>,
        fun: MathFunction,
        arg: Handle<Expression>,
        arg1: Option<Handle<Expression>>,
        arg2: Option<Handle<Expression>>,
    ) -> Result<String, String> {
        let kind = self.scalar(arg)?.kind;
        let float = kind == ScalarKind::Float;
        let other = |argument: Option<Handle<Expression>>, at| match argument {
            Some(argument) => self.component(argument, at),
            None => Err(format!("{fun:?} with too few arguments")),
        };
        if fun == MathFunction::Unpack2x16float {
            return Ok(format!("unpack2x16float({})", self.value(arg)?));
        }
        if fun == MathFunction::Dot {
            let product = |at| Ok(format!("{} * {}", self.component(arg, at)?, other(arg1, at)?));
            let products = (0..self.size(arg)).map(product).collect::<Result<Vec<_>, String>>()?;
            return Ok(products.join(" + "));
        }
        self.by_component(handle, &|at| {
            let x = self.component(arg, at)?;
            let call = |name: &str, count: usize| {
                let rest = [arg1, arg2].into_iter().take(count - 1).map(|argument| other(argument, at));
                let rest = rest.collect::<Result<Vec<_>, _>>()?;
                Ok(format!("{name}({})", [vec![x.clone()], rest].concat().join(", ")))
            };
            match (fun, float) {
                (MathFunction::Abs, true) => call("fabsf", 1),
                (MathFunction::Abs, false) => call("abs", 1),
                (MathFunction::Min, true) => call("fminf", 2),
                (MathFunction::Min, false) => call("min", 2),
                (MathFunction::Max, true) => call("fmaxf", 2),
                (MathFunction::Max, false) => call("max", 2),
                (MathFunction::Clamp, true) => {
                    Ok(format!("fminf(fmaxf({x}, {}), {})", other(arg1, at)?, other(arg2, at)?))
                }
                (MathFunction::Clamp, false) => {
                    Ok(format!("min(max({x}, {}), {})", other(arg1, at)?, other(arg2, at)?))
                }
                (MathFunction::Exp, true) => call("expf", 1),
                (MathFunction::Log, true) => call("logf", 1),
                (MathFunction::Pow, true) => call("powf", 2),
                (MathFunction::Sqrt, true) => call("sqrtf", 1),
                (MathFunction::Fma, true) => call("fmaf", 3),
                (MathFunction::Floor, true) => call("floorf", 1),
                (MathFunction::Ceil, true) => call("ceilf", 1),
                (MathFunction::Trunc, true) => call("truncf", 1),
                (MathFunction::Round, true) => call("rintf", 1),
                (MathFunction::Mix, true) => {
                    let (y, share) = (other(arg1, at)?, other(arg2, at)?);
                    Ok(format!("({x} * (1.0f - {share}) + {y} * {share})"))
                }
                (MathFunction::CountLeadingZeros, false) => Ok(format!("__clz(int({x}))")),
                (MathFunction::CountOneBits, false) => Ok(format!("__popc({x})")),
                (other, _) => Err(format!("the function {other:?} of {kind:?}")),
            }
        })
    }
}

fn binary(op: BinaryOperator, kind: ScalarKind, left: &str, right: &str) -> Result<String, String> {
    let symbol = match op {
        BinaryOperator::Add => "+",
        BinaryOperator::Subtract => "-",
        BinaryOperator::Multiply => "*",
        BinaryOperator::Divide => "/",
        BinaryOperator::Modulo if kind == ScalarKind::Float => return Ok(format!("fmodf({left}, {right})")),
        BinaryOperator::Modulo => "%",
        BinaryOperator::Equal => "==",
        BinaryOperator::NotEqual => "!=",
        BinaryOperator::Less => "<",
        BinaryOperator::LessEqual => "<=",
        BinaryOperator::Greater => ">",
        BinaryOperator::GreaterEqual => ">=",
        BinaryOperator::And => "&",
        BinaryOperator::ExclusiveOr => "^",
        BinaryOperator::InclusiveOr => "|",
        BinaryOperator::LogicalAnd => "&&",
        BinaryOperator::LogicalOr => "||",
        // WGSL counts modulo 32.
        BinaryOperator::ShiftLeft if kind == ScalarKind::Sint => {
            return Ok(format!("int(unsigned({left}) << ({right} & 31u))"));
        }
        BinaryOperator::ShiftLeft => return Ok(format!("({left} << ({right} & 31u))")),
        BinaryOperator::ShiftRight => return Ok(format!("({left} >> ({right} & 31u))")),
    };
    // Signed numbers wrap in WGSL and may not overflow in C++.
    let wraps = matches!(op, BinaryOperator::Add | BinaryOperator::Subtract | BinaryOperator::Multiply);
    Ok(if wraps && kind == ScalarKind::Sint {
        format!("int(unsigned({left}) {symbol} unsigned({right}))")
    } else {
        format!("({left} {symbol} {right})")
    })
}

/// A conversion, or the same bits.
fn cast(from: ScalarKind, to: ScalarKind, convert: bool, value: &str) -> Result<String, String> {
    use ScalarKind::{Bool, Float, Sint, Uint};
    Ok(match (convert, from, to) {
        (false, Float, Uint) => format!("__float_as_uint({value})"),
        (false, Float, Sint) => format!("__float_as_int({value})"),
        (false, Uint, Float) => format!("__uint_as_float({value})"),
        (false, Sint, Float) => format!("__int_as_float({value})"),
        // Saturate, as WGSL does.
        (true, Float, Uint) => format!("__float2uint_rz({value})"),
        (true, Float, Sint) => format!("__float2int_rz({value})"),
        (true, _, Float) => format!("float({value})"),
        (true, _, Bool) => format!("({value} != 0)"),
        (_, _, Uint) => format!("unsigned({value})"),
        (_, _, Sint) => format!("int({value})"),
        (_, Float, Float) => value.into(),
        (convert, from, to) => return Err(format!("{from:?} as {to:?} ({convert})")),
    })
}
