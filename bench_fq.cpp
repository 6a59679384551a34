#include "csrc/cpu/kernels.h"
#include <chrono>
#include <cstdio>
#include <cstring>
#include <cstdlib>
using namespace dfq;
int main(int,char**argv){
  int64_t n=128*16*1024; int C=16; int64_t inner=atoi(argv[1]);
  float*x=(float*)aligned_alloc(64,n*4),*o=(float*)aligned_alloc(64,n*4); uint8_t*m=(uint8_t*)malloc(n/8+8);
  for(int i=0;i<n;i++)x[i]=(i*7919L%1000)/100.f-5; memset(o,0,n*4);
  float s[16],z[16]; for(int i=0;i<16;i++){s[i]=.1f;z[i]=3;}
  auto now=[]{return std::chrono::steady_clock::now();};
  auto t=[&](auto f){double best=1e9;for(int r=0;r<60;r++){auto a=now();f();double d=std::chrono::duration<double>(now()-a).count();if(d<best)best=d;}return best*1e3;};
  View v{n,inner?C:1,inner?inner:n};
  printf("copy %.3f ",t([&]{memcpy(o,x,n*4);}));
  printf("fwd %.3f ",t([&]{DFQ_ISA::fake_quant_forward({0,1,v,x,s,z,0,15,o,m});}));
  printf("bwd %.3f ",t([&]{DFQ_ISA::mask_backward({0,1,n,x,m,o});}));
  printf("bf16 fwd %.3f\n",t([&]{DFQ_ISA::fake_quant_forward({1,1,v,x,s,z,0,15,o,m});}));
}
