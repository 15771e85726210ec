// What expanded.h declares, for every arithmetic of every level.
#include "expanded.h"

#include "parallel.h"

namespace fx {
namespace {

// Calls `work.template operator()<N>()` for the N in [Low, High] that `n` is.
template <int Low, int High, class Work>
void with_number(int64_t n, const Work& work) {
  if constexpr (Low < High) {
    if (n > Low) return with_number<Low + 1, High>(n, work);
  }
  work.template operator()<Low>();
}

// Adds to the sums of `Rows` x `Panels` what `steps` expanded steps, side by side, make of a tile.
template <class Math, int Rows, int Panels>
void multiply_tile(
    const typename Math::Weights* weights, int64_t steps, const typename Math::Input* x,
    typename Math::Sum* sums) {
  typename Math::Sum sum[Rows][Panels];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; r++) {
#pragma GCC unroll 2
    for (int p = 0; p < Panels; p++) sum[r][p] = sums[r * Panels + p];
  }
  for (int64_t i = 0; i < steps; i++, weights += Panels, x += Rows * Math::kGroup) {
#pragma GCC unroll 16
    for (int r = 0; r < Rows; r++) {
#pragma GCC unroll 2
      for (int p = 0; p < Panels; p++) {
        sum[r][p] = Math::dot(sum[r][p], weights[p], x + r * Math::kGroup);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; r++) {
#pragma GCC unroll 2
    for (int p = 0; p < Panels; p++) sums[r * Panels + p] = sum[r][p];
  }
}

}  // namespace

template <class Math>
void multiply_expanded(
    int64_t panels, int64_t steps, const Tiles<typename Math::Input>& tiles, const Result& result,
    const void* packed, WithReader<Math> with_reader) {
  using Weights = typename Math::Weights;
  using Sum = typename Math::Sum;
  constexpr int side = Math::kTilePanels;
  static_assert(side <= kMostPanels);
  constexpr int64_t slice = (1 << 14) / sizeof(Weights);  // 16 KB a panel
  const int64_t height = tiles.height, sides = (panels + side - 1) / side;
  const auto multiply_sides = [&](int64_t begin, int64_t end, Reader<Math>& reader) {
    const Buffer<Weights> weights(slice * side);
    const Buffer<Sum> sums(tiles.count * height * side);
    for (int64_t s = begin; s < end; s++) {
      std::fill_n(sums.get(), tiles.count * height * side, Sum{});
      const int64_t first = s * side, present = std::min<int64_t>(side, panels - first);
      if (present < side) std::fill_n(weights.get(), slice * side, Weights{});
      reader.start(first, present);
      for (int64_t at = 0; at < steps; at += slice) {
        const int64_t count = std::min(slice, steps - at);
        reader.read(count, side, weights.get());
        with_number<kLeastTileRows<Math>, Math::kTileRows>(height, [&]<int Rows>() {
          for (int64_t t = 0; t < tiles.count; t++) {
            const auto* x = tiles.tile(t) + at * Rows * Math::kGroup;
            multiply_tile<Math, Rows, side>(weights.get(), count, x, &sums[t * Rows * side]);
          }
        });
      }
      for (int64_t p = 0; p < present; p++) {
        const PanelResult columns(result, first + p);
        for (int64_t row = 0; row < result.rows; row++) {
          write<Math>(columns, row, sums[row * side + p]);
        }
      }
    }
  };
  parallel_for(0, sides, 1, [&](int64_t begin, int64_t end) {
    auto work = [&](Reader<Math>& reader) { multiply_sides(begin, end, reader); };
    const auto call = [](void* context, Reader<Math>& reader) {
      (*static_cast<decltype(work)*>(context))(reader);
    };
    with_reader(packed, call, &work);
  });
}

#define FX_EXPANDED(Math) \
  template void multiply_expanded<Math>( \
      int64_t, int64_t, const Tiles<Math::Input>&, const Result&, const void*, WithReader<Math>)

#if FX_PORTABLE
FX_EXPANDED(Portable::F32);
FX_EXPANDED(Portable::BF16);
FX_EXPANDED(Portable::I8);
FX_EXPANDED(Portable::W8<float>);
#endif
#if FX_AVX2
FX_EXPANDED(Avx2::F32);
FX_EXPANDED(Avx2::BF16);
FX_EXPANDED(Avx2::I8);
FX_EXPANDED(Avx2::W8<float>);
#endif
#if FX_AVX512
FX_EXPANDED(avx512::F32);
#endif
#if FX_AVX512_VNNI
FX_EXPANDED(Avx512Vnni::BF16);
FX_EXPANDED(Avx512Vnni::I8);
FX_EXPANDED(Avx512Vnni::W8<float>);
#endif
#if FX_AVX512 && FX_VBMI2
FX_EXPANDED(Avx512Vbmi2::BF16);
FX_EXPANDED(Avx512Vbmi2::I8);
FX_EXPANDED(Avx512Vbmi2::W8<float>);
#endif
#if FX_AVX512 && FX_BF16
FX_EXPANDED(Avx512Bf16::BF16);
FX_EXPANDED(Avx512Bf16::W8<BFloat>);
#endif

}  // namespace fx
