//! Tiles of `grouped_gemm` in x86's vector instructions: one text, with two sets of instructions.
//!
//! Both have the same bits: every operation is one rounding of the same values in the same order.

use std::ops::Range;

use super::gemm::{Instructions, LANES, Packed, PackedRow, Scaling, TILE};
use crate::kernels::pack::PackedBlocks;
use crate::weights::{Code, PackedScale};

impl Instructions {
    /// The best that the machine has.
    pub fn detect() -> Option<Self> {
        let avx2 =
            is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
        let avx512 = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vbmi");
        match (avx2, avx512) {
            (true, true) => Some(Self::Avx512),
            (true, false) => Some(Self::Avx2),
            (false, _) => None,
        }
    }

    /// The scales of a row of blocks as f32, and their zeros or minima.
    #[allow(unsafe_code, reason = "instructions that not every x86 has")]
    pub fn scales(self, blocks: PackedBlocks, words: &[u32], scales: &mut [f32], offsets: &mut [f32]) {
        match self {
            // SAFETY: `detect` makes this value where the machine has them; tests make the one below it.
            Self::Avx512 => unsafe { avx512::scales(blocks, words, scales, offsets) },
            // SAFETY: likewise.
            Self::Avx2 => unsafe { avx2::scales(blocks, words, scales, offsets) },
        }
    }

    /// The sums of each packed row with each of `x`, at most `TILE` arranged entering rows. `ahead` are rows of the
    /// tile behind this one, for which memory is asked meanwhile.
    #[allow(unsafe_code, reason = "instructions that not every x86 has")]
    pub fn multiply(self, packed: &Packed<'_>, x: &[&[f32]], ahead: Range<usize>, sums: &mut [[f32; TILE]; TILE]) {
        match self {
            // SAFETY: `detect` makes this value where the machine has them; tests make the one below it.
            Self::Avx512 => unsafe { avx512::multiply(packed, x, ahead, sums) },
            // SAFETY: likewise.
            Self::Avx2 => unsafe { avx2::multiply(packed, x, ahead, sums) },
        }
    }
}

/// A row's vectors of sixteen words, and the last padded with zeros where it is not whole.
struct Vecs<'a> {
    whole: &'a [[u32; LANES]],
    last: [[u32; LANES]; 1],
}

impl<'a> Vecs<'a> {
    fn of(words: &'a [u32]) -> Self {
        let (whole, rest) = words.as_chunks::<LANES>();
        let mut last = [0; LANES];
        last[..rest.len()].copy_from_slice(rest);
        Self { whole, last: [last] }
    }

    fn of_all<const ROWS: usize>(rows: &[PackedRow<'a>; ROWS]) -> [Self; ROWS] {
        rows.each_ref().map(|row| Self::of(row.words))
    }
}

/// The whole vectors of each row, or their last ones: `count` of them.
fn part<'a, const ROWS: usize>(vecs: &'a [Vecs<'_>; ROWS], last: bool, count: usize) -> [&'a [[u32; LANES]]; ROWS] {
    vecs.each_ref().map(|vecs| if last { &vecs.last[..count] } else { &vecs.whole[..count] })
}

/// What meets them of entering rows: `N` runs for each vector from vector `first` on.
fn runs<const N: usize, const M: usize>(x: [&[f32]; M], first: usize, count: usize) -> [&[[[f32; LANES]; N]]; M] {
    x.map(|x| &x.as_chunks::<LANES>().0.as_chunks::<N>().0[first..][..count])
}

/// As many as a vector may have, from `first` on; zeros where there are none.
fn window(scales: &[f32], first: usize) -> &[f32; LANES] {
    scales.get(first..).and_then(|rest| rest.first_chunk()).unwrap_or(&[0.0; LANES])
}

/// Asks for what the next tile reads while this one is computed: rows lie one behind the other.
#[allow(unsafe_code, reason = "an instruction on an address")]
#[inline]
fn prefetch(words: &[u32; LANES], ahead: usize) {
    use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
    // SAFETY: a hint, which reads nothing: any address will do.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(words.as_ptr().wrapping_add(ahead).cast()) }
}

/// Values of the four-bit codes, by code.
const E2M1: [f32; 16] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];
const INT4: [f32; 16] = [-8.0, -7.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0];
const UINT4: [f32; 16] = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0];

/// What a scale does, as a constant of a tile's text: the numbers of [`Scaling`].
const NONE: u8 = Scaling::None as u8;
const SCALE: u8 = Scaling::Scale as u8;
const ZERO: u8 = Scaling::Zero as u8;
const MIN: u8 = Scaling::Min as u8;

/// Calls `$then` with what decodes sixteen words of the rows' code: how many codes a word has, what their scales do,
/// what makes something of sixteen words, and of that the codes at one place of each.
macro_rules! by_code {
    ($packed:expr, $then:ident, [$($constant:tt)*], $($argument:expr),*) => {{
        let scaling = $packed.scaling;
        match $packed.code {
            Code::F32 => $then::<1, NONE, ROWS, $($constant)* _>(|words| whole(words), |part, _| f32s(part), $($argument),*),
            Code::F16 => $then::<2, NONE, ROWS, $($constant)* _>(|words| whole(words), |part, at| f16s(part, at), $($argument),*),
            Code::Bf16 => $then::<2, NONE, ROWS, $($constant)* _>(|words| whole(words), |part, at| bf16s(part, at), $($argument),*),
            Code::E4m3 => match scaling {
                Scaling::None => $then::<4, NONE, E4M3_ROWS, $($constant)* _>(|words| e4m3(words), |part, at| e4m3s(part, at), $($argument),*),
                Scaling::Scale | Scaling::Zero | Scaling::Min => {
                    $then::<4, SCALE, E4M3_ROWS, $($constant)* _>(|words| e4m3(words), |part, at| e4m3s(part, at), $($argument),*)
                }
            },
            Code::Int8 => match scaling {
                Scaling::None => $then::<4, NONE, ROWS, $($constant)* _>(|words| whole(words), |part, at| int8s(part, at), $($argument),*),
                Scaling::Scale | Scaling::Zero | Scaling::Min => {
                    $then::<4, SCALE, ROWS, $($constant)* _>(|words| whole(words), |part, at| int8s(part, at), $($argument),*)
                }
            },
            Code::E2m1 | Code::Int4 | Code::Uint4 => {
                let values = match $packed.code {
                    Code::E2m1 => &E2M1,
                    Code::Int4 => &INT4,
                    Code::F32 | Code::F16 | Code::Bf16 | Code::E4m3 | Code::Int8 | Code::Uint4 => &UINT4,
                };
                let table = table(values);
                match scaling {
                    Scaling::None | Scaling::Scale => {
                        $then::<8, SCALE, ROWS, $($constant)* _>(|words| whole(words), |part, at| looked_up(table, part, at), $($argument),*)
                    }
                    Scaling::Zero => {
                        $then::<8, ZERO, ROWS, $($constant)* _>(|words| whole(words), |part, at| looked_up(table, part, at), $($argument),*)
                    }
                    Scaling::Min => {
                        $then::<8, MIN, ROWS, $($constant)* _>(|words| whole(words), |part, at| looked_up(table, part, at), $($argument),*)
                    }
                }
            }
        }
    }};
}

/// What is the same text for both sets of instructions. A module gives the operations on `V`, sixteen floats, and the
/// numbers of packed rows of a tile; `$most` is that of entering rows.
macro_rules! tiles {
    ($features:literal, $most:literal) => {
        /// See [`Instructions::scales`].
        #[target_feature(enable = $features)]
        pub(super) fn scales(blocks: PackedBlocks, words: &[u32], scales: &mut [f32], offsets: &mut [f32]) {
            let halves: &[u16] = bytemuck::cast_slice(words);
            let bytes: &[u8] = bytemuck::cast_slice(words);
            // Loops without branches, which a compiler makes vectors of; scales are finite.
            match blocks.scale {
                PackedScale::F32 => scales.copy_from_slice(bytemuck::cast_slice(words)),
                PackedScale::F16 => {
                    for (scale, half) in scales.iter_mut().zip(halves) {
                        let half = u32::from(*half);
                        // As a float with f16's exponent, which lacks 2^112; exact, subnormals too.
                        let magnitude = f32::from_bits((half & 0x7fff) << 13) * f32::from_bits((127 + 112) << 23);
                        *scale = f32::from_bits(magnitude.to_bits() | (half & 0x8000) << 16);
                    }
                }
                PackedScale::Bf16 => {
                    for (scale, half) in scales.iter_mut().zip(halves) {
                        *scale = f32::from_bits(u32::from(*half) << 16);
                    }
                }
                PackedScale::E8m0 => {
                    for (scale, byte) in scales.iter_mut().zip(bytes) {
                        let bits = u32::from(*byte) << 23;
                        *scale = f32::from_bits(if bits == 0 { 0x0040_0000 } else { bits });
                    }
                }
                PackedScale::E4m3 => {
                    for (scale, byte) in scales.iter_mut().zip(bytes) {
                        let byte = u32::from(*byte);
                        // Likewise, 2^120.
                        let magnitude = f32::from_bits((byte & 0x7f) << 20) * f32::from_bits((127 + 120) << 23);
                        *scale = f32::from_bits(magnitude.to_bits() | (byte & 0x80) << 24);
                    }
                }
                PackedScale::F16Zero | PackedScale::Bf16Zero | PackedScale::Q4K | PackedScale::Q6K => {
                    for (block, (scale, offset)) in scales.iter_mut().zip(offsets).enumerate() {
                        let [factor, zero, min] = blocks.scale_of(words, block);
                        // No format has both.
                        (*scale, *offset) = (factor, zero + min);
                    }
                }
            }
        }

        /// See [`Instructions::multiply`].
        #[target_feature(enable = $features)]
        pub(super) fn multiply(packed: &Packed<'_>, x: &[&[f32]], ahead: Range<usize>, sums: &mut [[f32; TILE]; TILE]) {
            for (at, x) in x.chunks($most).enumerate() {
                let first = at * $most;
                match *x {
                    [] => {}
                    [a] => by_code!(packed, tile, [1,], packed, [a], ahead.clone(), sums, first),
                    [a, b] => by_code!(packed, tile, [2,], packed, [a, b], ahead.clone(), sums, first),
                    [a, b, c] => by_code!(packed, tile, [3,], packed, [a, b, c], ahead.clone(), sums, first),
                    [a, b, c, d, ..] => by_code!(packed, tile, [4,], packed, [a, b, c, d], ahead.clone(), sums, first),
                }
            }
        }

        #[target_feature(enable = $features)]
        fn tile<const N: usize, const SCALING: u8, const ROWS: usize, const M: usize, P: Copy>(
            prepare: impl Fn(&[u32; LANES]) -> P,
            codes: impl Fn(P, usize) -> V,
            packed: &Packed<'_>,
            x: [&[f32]; M],
            ahead: Range<usize>,
            sums: &mut [[f32; TILE]; TILE],
            first: usize,
        ) {
            let rows = packed.rows.as_chunks::<ROWS>().0;
            for (at, (rows, sums)) in rows.iter().zip(sums.chunks_exact_mut(ROWS)).enumerate() {
                let ahead = std::array::from_fn(|row| ahead.contains(&(at * ROWS + row)));
                rows_of_tile::<N, SCALING, ROWS, M, P>((&prepare, &codes), packed, rows, x, ahead, sums, first);
            }
        }

        #[target_feature(enable = $features)]
        #[inline]
        fn rows_of_tile<const N: usize, const SCALING: u8, const ROWS: usize, const M: usize, P: Copy>(
            (prepare, codes): (&impl Fn(&[u32; LANES]) -> P, &impl Fn(P, usize) -> V),
            packed: &Packed<'_>,
            rows: &[PackedRow<'_>; ROWS],
            x: [&[f32]; M],
            ahead: [bool; ROWS],
            sums: &mut [[f32; TILE]],
            first: usize,
        ) {
            let lanes = table_at(&packed.places.lanes);
            let vecs = Vecs::of_all(rows);
            let (words, whole) = (rows[0].words.len(), vecs[0].whole.len());
            let mut totals = [[zero(); M]; ROWS];
            for (last, first, count) in [(false, 0, whole), (true, whole, words.div_ceil(LANES) - whole)] {
                let (rows_of, x) = (part(&vecs, last, count), runs::<N, M>(x, first, count));
                for at in 0..count {
                    let mut parts = [prepare(&rows_of[0][at]); ROWS];
                    let mut factors_of = [factors::<SCALING>(packed, &rows[0], first + at, lanes); ROWS];
                    for row in 1..ROWS {
                        parts[row] = prepare(&rows_of[row][at]);
                        factors_of[row] = factors::<SCALING>(packed, &rows[row], first + at, lanes);
                    }
                    for row in 0..ROWS {
                        if ahead[row] {
                            prefetch(&rows_of[row][at], TILE * words);
                        }
                    }
                    for place in 0..N {
                        let mut weights = [zero(); ROWS];
                        for row in 0..ROWS {
                            let [scale, offset] = factors_of[row];
                            weights[row] = scaled::<SCALING>(codes(parts[row], place), scale, offset);
                        }
                        for m in 0..M {
                            let x = load(&x[m][at][place]);
                            for row in 0..ROWS {
                                totals[row][m] = fma(weights[row], x, totals[row][m]);
                            }
                        }
                    }
                }
            }
            for (sums, totals) in sums.iter_mut().zip(totals) {
                for (sum, of_lanes) in sums[first..].iter_mut().zip(totals) {
                    *sum = total(of_lanes);
                }
            }
        }

        /// The scales of a vector's words, and their zeros or minima.
        #[target_feature(enable = $features)]
        #[inline]
        fn factors<const SCALING: u8>(packed: &Packed<'_>, row: &PackedRow<'_>, at: usize, lanes: I) -> [V; 2] {
            let first = at * packed.places.per_vec / packed.places.vecs;
            match SCALING {
                NONE => [zero(); 2],
                SCALE => [pick(window(row.scales, first), lanes), zero()],
                _ => [pick(window(row.scales, first), lanes), pick(window(row.offsets, first), lanes)],
            }
        }

        #[target_feature(enable = $features)]
        #[inline]
        fn scaled<const SCALING: u8>(codes: V, scale: V, offset: V) -> V {
            match SCALING {
                NONE => codes,
                SCALE => mul(codes, scale),
                ZERO => mul(sub(codes, offset), scale),
                _ => fma_less(codes, scale, offset),
            }
        }
    };
}

/// Values of the E4M3 codes without sign as bfloat16, which holds them exactly: its low bytes, its high bytes.
const E4M3_BYTES: [[u8; 128]; 2] = {
    let mut bytes = [[0; 128]; 2];
    let mut code = 0;
    while code < 128 {
        let bits = match code {
            0x7f => f32::NAN.to_bits(),
            0..8 => (code as f32 * 0.001_953_125).to_bits(),
            _ => ((code as u32) << 20) + (120 << 23),
        };
        bytes[0][code] = (bits >> 16) as u8;
        bytes[1][code] = (bits >> 24) as u8;
        code += 1;
    }
    bytes
};

mod avx512 {
    use std::arch::x86_64::*;

    use super::*;

    type V = __m512;
    type I = __m512i;

    tiles!("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi", 4);

    /// Packed rows whose sums, with those of four entering rows, leave registers to decode.
    const ROWS: usize = 4;
    /// E4M3's tables take four.
    const E4M3_ROWS: usize = 2;

    macro_rules! operation {
        ($name:ident($($argument:ident: $kind:ty),*) -> $result:ty, $body:expr) => {
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
            #[inline]
            fn $name($($argument: $kind),*) -> $result {
                $body
            }
        };
    }

    operation!(zero() -> V, _mm512_setzero_ps());
    operation!(load(values: &[f32; LANES]) -> V, bytemuck::cast(*values));
    operation!(mul(a: V, b: V) -> V, _mm512_mul_ps(a, b));
    operation!(sub(a: V, b: V) -> V, _mm512_sub_ps(a, b));
    operation!(fma(a: V, b: V, sum: V) -> V, _mm512_fmadd_ps(a, b, sum));
    operation!(fma_less(a: V, b: V, c: V) -> V, _mm512_fmsub_ps(a, b, c));
    operation!(total(values: V) -> f32, {
        let eight = _mm256_add_ps(_mm512_castps512_ps256(values), _mm512_extractf32x8_ps::<1>(values));
        super::total_of_eight(bytemuck::cast(eight))
    });
    operation!(table(values: &[f32; LANES]) -> V, load(values));
    operation!(table_at(places: &[u32; LANES]) -> I, bytemuck::cast(*places));
    operation!(pick(values: &[f32; LANES], places: I) -> V, _mm512_permutexvar_ps(places, load(values)));
    operation!(whole(words: &[u32; LANES]) -> I, bytemuck::cast(*words));
    operation!(f32s(words: I) -> V, _mm512_castsi512_ps(words));
    operation!(right(words: I, bits: usize) -> I, _mm512_srl_epi32(words, _mm_cvtsi32_si128(bits as i32)));
    operation!(left(words: I, bits: usize) -> I, _mm512_sll_epi32(words, _mm_cvtsi32_si128(bits as i32)));
    operation!(f16s(words: I, at: usize) -> V, _mm512_cvtph_ps(_mm512_cvtepi32_epi16(right(words, 16 * at))));
    operation!(bf16s(words: I, at: usize) -> V, match at {
        0 => f32s(left(words, 16)),
        _ => f32s(_mm512_and_si512(words, _mm512_set1_epi32(-0x1_0000))),
    });
    operation!(int8s(words: I, at: usize) -> V, _mm512_cvtepi32_ps(_mm512_srai_epi32::<24>(left(words, 24 - 8 * at))));
    operation!(looked_up(values: V, words: I, at: usize) -> V, _mm512_permutexvar_ps(right(words, 4 * at), values));
    // The codes as bfloat16, two a word: in order of words the first two of each, then the last two.
    operation!(e4m3(words: &[u32; LANES]) -> [I; 2], {
        let halves = _mm_set_epi8(15, 14, 11, 10, 7, 6, 3, 2, 13, 12, 9, 8, 5, 4, 1, 0);
        let codes = _mm512_shuffle_epi8(whole(words), _mm512_broadcast_i32x4(halves));
        let byte = |table: &[u8; 128]| {
            let [low, high]: [[u8; 64]; 2] = bytemuck::cast(*table);
            _mm512_permutex2var_epi8(bytemuck::cast(low), codes, bytemuck::cast(high))
        };
        let [low, high] = [byte(&E4M3_BYTES[0]), byte(&E4M3_BYTES[1])];
        // The table's bits, and the sign's bit of the code.
        let high = _mm512_ternarylogic_epi32::<0b1111_1000>(high, codes, _mm512_set1_epi8(-0x80));
        [_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)]
    });
    operation!(e4m3s(halves: [I; 2], at: usize) -> V, bf16s(halves[at / 2], at % 2));
}

mod avx2 {
    use std::arch::x86_64::*;

    use super::*;

    type V = [__m256; 2];
    type I = [__m256i; 2];

    tiles!("avx2,fma,f16c", 2);

    /// Packed rows whose sums, with those of two entering rows, leave registers to decode.
    const ROWS: usize = 2;
    const E4M3_ROWS: usize = 2;

    macro_rules! operation {
        ($name:ident($($argument:ident: $kind:ty),*) -> $result:ty, $body:expr) => {
            #[target_feature(enable = "avx2,fma,f16c")]
            #[inline]
            fn $name($($argument: $kind),*) -> $result {
                $body
            }
        };
    }

    operation!(zero() -> V, [_mm256_setzero_ps(); 2]);
    operation!(load(values: &[f32; LANES]) -> V, bytemuck::cast(*values));
    operation!(mul(a: V, b: V) -> V, [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])]);
    operation!(sub(a: V, b: V) -> V, [_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])]);
    operation!(fma(a: V, b: V, sum: V) -> V, [
        _mm256_fmadd_ps(a[0], b[0], sum[0]),
        _mm256_fmadd_ps(a[1], b[1], sum[1]),
    ]);
    operation!(fma_less(a: V, b: V, c: V) -> V, [_mm256_fmsub_ps(a[0], b[0], c[0]), _mm256_fmsub_ps(a[1], b[1], c[1])]);
    operation!(total(values: V) -> f32, {
        super::total_of_eight(bytemuck::cast(_mm256_add_ps(values[0], values[1])))
    });
    operation!(table(values: &[f32; LANES]) -> V, load(values));
    operation!(table_at(places: &[u32; LANES]) -> I, bytemuck::cast(*places));
    // Of sixteen, by three bits of a place in each half, then by the fourth.
    operation!(look_up(values: V, places: __m256i) -> __m256, {
        let [low, high] = [_mm256_permutevar8x32_ps(values[0], places), _mm256_permutevar8x32_ps(values[1], places)];
        _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32::<28>(places)))
    });
    operation!(pick(values: &[f32; LANES], places: I) -> V, {
        let values = load(values);
        [look_up(values, places[0]), look_up(values, places[1])]
    });
    operation!(whole(words: &[u32; LANES]) -> I, bytemuck::cast(*words));
    operation!(f32s(words: I) -> V, [_mm256_castsi256_ps(words[0]), _mm256_castsi256_ps(words[1])]);
    operation!(right(words: I, bits: usize) -> I, {
        let bits = _mm_cvtsi32_si128(bits as i32);
        [_mm256_srl_epi32(words[0], bits), _mm256_srl_epi32(words[1], bits)]
    });
    operation!(left(words: I, bits: usize) -> I, {
        let bits = _mm_cvtsi32_si128(bits as i32);
        [_mm256_sll_epi32(words[0], bits), _mm256_sll_epi32(words[1], bits)]
    });
    operation!(and(words: I, mask: i32) -> I, {
        let mask = _mm256_set1_epi32(mask);
        [_mm256_and_si256(words[0], mask), _mm256_and_si256(words[1], mask)]
    });
    operation!(f16s(words: I, at: usize) -> V, {
        let [low, high] = and(right(words, 16 * at), 0xffff);
        let halves = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi32(low, high));
        [_mm256_cvtph_ps(_mm256_castsi256_si128(halves)), _mm256_cvtph_ps(_mm256_extracti128_si256::<1>(halves))]
    });
    operation!(bf16s(words: I, at: usize) -> V, match at {
        0 => f32s(left(words, 16)),
        _ => f32s(and(words, -0x1_0000)),
    });
    operation!(int8s(words: I, at: usize) -> V, {
        let [low, high] = left(words, 24 - 8 * at);
        let float = |words| _mm256_cvtepi32_ps(_mm256_srai_epi32::<24>(words));
        [float(low), float(high)]
    });
    operation!(looked_up(values: V, words: I, at: usize) -> V, {
        let [low, high] = right(words, 4 * at);
        [look_up(values, low), look_up(values, high)]
    });
    operation!(e4m3(words: &[u32; LANES]) -> I, whole(words));
    operation!(e4m3s(words: I, at: usize) -> V, {
        let value = |code: __m256i| {
            let sign = _mm256_and_si256(code, _mm256_set1_epi32(i32::MIN));
            let bits = _mm256_srli_epi32::<4>(_mm256_andnot_si256(sign, code));
            let normal = _mm256_castsi256_ps(_mm256_add_epi32(bits, _mm256_set1_epi32(120 << 23)));
            // A subnormal code has no leading one, and the exponent above: 2 * (1 + m / 8) * 2^-7 - 2^-6. No float is
            // subnormal on the way, which costs some machines much.
            let subnormal = _mm256_fmsub_ps(normal, _mm256_set1_ps(2.0), _mm256_set1_ps(0.015_625));
            let small = _mm256_cmpgt_epi32(_mm256_set1_epi32(8 << 20), bits);
            let value = _mm256_blendv_ps(normal, subnormal, _mm256_castsi256_ps(small));
            let value = _mm256_or_ps(value, _mm256_castsi256_ps(sign));
            let magnitude = _mm256_and_si256(code, _mm256_set1_epi32(0x7f00_0000));
            // All bits where the code is NaN's.
            let nan = _mm256_cmpeq_epi32(magnitude, _mm256_set1_epi32(0x7f00_0000));
            _mm256_or_ps(value, _mm256_castsi256_ps(nan))
        };
        let [low, high] = left(words, 24 - 8 * at);
        let top = |words| _mm256_and_si256(words, _mm256_set1_epi32(0xff00_0000_u32 as i32));
        [value(top(low)), value(top(high))]
    });
}

/// The sum of eight, halved three times.
fn total_of_eight(values: [f32; 8]) -> f32 {
    let four: [f32; 4] = std::array::from_fn(|at| values[at] + values[at + 4]);
    let two = [four[0] + four[2], four[1] + four[3]];
    two[0] + two[1]
}
