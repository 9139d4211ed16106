package main

import (
	"container/heap"
	"log"
	"math/rand"
	"net"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
)

// relay carries datagrams between whoever called last and a target, late, with losses and out of
// order, because the kernel's netem is not to be had everywhere.
//
//	peers relay LISTEN TARGET DELAY LOSS REORDER JITTER SEED
//
// DELAY is one way. LOSS and REORDER are shares of all datagrams, each direction; a reordered one
// takes up to JITTER longer.
type relay struct {
	delay, jitter time.Duration
	loss, reorder float64
	caller        atomic.Pointer[net.UDPAddr]
}

type held struct {
	due    time.Time
	order  uint64
	octets []byte
}

type queue []held

func (q queue) Len() int { return len(q) }
func (q queue) Less(i, j int) bool {
	if q[i].due.Equal(q[j].due) {
		return q[i].order < q[j].order
	}
	return q[i].due.Before(q[j].due)
}
func (q queue) Swap(i, j int) { q[i], q[j] = q[j], q[i] }
func (q *queue) Push(x any)   { *q = append(*q, x.(held)) }
func (q *queue) Pop() any {
	old := *q
	last := old[len(old)-1]
	*q = old[:len(old)-1]
	return last
}

const socketBuffer = 8 << 20

func serveRelay(args []string) {
	if len(args) != 7 {
		log.Fatal("relay LISTEN TARGET DELAY LOSS REORDER JITTER SEED")
	}
	duration := func(text string) time.Duration {
		value, err := time.ParseDuration(text)
		if err != nil {
			log.Fatal(err)
		}
		return value
	}
	share := func(text string) float64 {
		value, err := strconv.ParseFloat(text, 64)
		if err != nil {
			log.Fatal(err)
		}
		return value
	}
	seed, err := strconv.ParseInt(args[6], 10, 64)
	if err != nil {
		log.Fatal(err)
	}
	resolve := func(text string) *net.UDPAddr {
		address, err := net.ResolveUDPAddr("udp", text)
		if err != nil {
			log.Fatal(err)
		}
		return address
	}
	outside, err := net.ListenUDP("udp", resolve(args[0]))
	if err != nil {
		log.Fatal(err)
	}
	inside, err := net.DialUDP("udp", nil, resolve(args[1]))
	if err != nil {
		log.Fatal(err)
	}
	for _, socket := range []*net.UDPConn{outside, inside} {
		if socket.SetReadBuffer(socketBuffer) != nil || socket.SetWriteBuffer(socketBuffer) != nil {
			log.Print("relay: small socket buffers")
		}
	}
	r := &relay{delay: duration(args[2]), loss: share(args[3]), reorder: share(args[4]), jitter: duration(args[5])}
	os.Stdout.WriteString("up\n")
	go r.carry(outside, seed, true, func(octets []byte) {
		inside.Write(octets)
	})
	r.carry(inside, seed+1, false, func(octets []byte) {
		if caller := r.caller.Load(); caller != nil {
			outside.WriteToUDP(octets, caller)
		}
	})
}

func (r *relay) carry(from *net.UDPConn, seed int64, learns bool, send func([]byte)) {
	var lock sync.Mutex
	ready := sync.NewCond(&lock)
	var waiting queue
	go func() {
		for {
			lock.Lock()
			for len(waiting) == 0 {
				ready.Wait()
			}
			wait := time.Until(waiting[0].due)
			if wait > 0 {
				lock.Unlock()
				time.Sleep(min(wait, 200*time.Microsecond))
				continue
			}
			now := time.Now()
			var due []held
			for len(waiting) > 0 && !waiting[0].due.After(now) {
				due = append(due, heap.Pop(&waiting).(held))
			}
			lock.Unlock()
			for _, one := range due {
				send(one.octets)
			}
		}
	}()
	chance := rand.New(rand.NewSource(seed))
	buffer := make([]byte, 1<<16)
	var order uint64
	for {
		n, caller, err := from.ReadFromUDP(buffer)
		if err != nil {
			continue
		}
		if learns {
			r.caller.Store(caller)
		}
		if chance.Float64() < r.loss {
			continue
		}
		due := time.Now().Add(r.delay)
		if chance.Float64() < r.reorder {
			due = due.Add(time.Duration(chance.Float64() * float64(r.jitter)))
		}
		order++
		octets := append([]byte(nil), buffer[:n]...)
		lock.Lock()
		heap.Push(&waiting, held{due, order, octets})
		lock.Unlock()
		ready.Signal()
	}
}
